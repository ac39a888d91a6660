"""Skeletons: matrices from a few of their own columns and rows (posts kexue.fm/archives/10407, 10427, 10501, 10662)."""

from quintic.lowrank.attention import NystromAttention, nystrom_attention
from quintic.lowrank.compression import CompressedLayer, Compression, compress, load_compressed
from quintic.lowrank.factored import FactoredLinear
from quintic.lowrank.interpolation import Interpolation, interpolative
from quintic.lowrank.kernel import Nystrom, nystrom
from quintic.lowrank.kernel_matrix import KernelMatrix
from quintic.lowrank.product import ProductSkeleton, cr
from quintic.lowrank.result import Approximation
from quintic.lowrank.retrieval import CurIndex, SearchResult
from quintic.lowrank.row_blocks import RowBlocks
from quintic.lowrank.selection import RULES, select_columns, select_rows
from quintic.lowrank.singular import SVD, svd
from quintic.lowrank.skeleton import Skeleton, cur
from quintic.lowrank.streaming import OnePass, read_once

__all__ = [
    "RULES",
    "SVD",
    "Approximation",
    "CompressedLayer",
    "Compression",
    "CurIndex",
    "FactoredLinear",
    "Interpolation",
    "KernelMatrix",
    "Nystrom",
    "NystromAttention",
    "OnePass",
    "ProductSkeleton",
    "RowBlocks",
    "SearchResult",
    "Skeleton",
    "compress",
    "cr",
    "cur",
    "interpolative",
    "load_compressed",
    "nystrom",
    "nystrom_attention",
    "read_once",
    "select_columns",
    "select_rows",
    "svd",
]
