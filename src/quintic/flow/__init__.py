"""TARFLOW: a normalizing flow of images with exact likelihood and exact, fast sampling."""

from quintic.flow.config import TarFlowConfig
from quintic.flow.guess import LinearGuess
from quintic.flow.guidance import Guidance
from quintic.flow.inpainting import Inpainting, inpaint
from quintic.flow.loading import load_flow, save_flow, shipped_flow, shipped_flow_names
from quintic.flow.outliers import ImageScores, score_images
from quintic.flow.planning import SamplingPlan, plan_sampling
from quintic.flow.reference import load_reference
from quintic.flow.samples import Samples
from quintic.flow.tarflow import TarFlow

__all__ = [
    "Guidance",
    "ImageScores",
    "Inpainting",
    "LinearGuess",
    "Samples",
    "SamplingPlan",
    "TarFlow",
    "TarFlowConfig",
    "inpaint",
    "load_flow",
    "load_reference",
    "plan_sampling",
    "save_flow",
    "score_images",
    "shipped_flow",
    "shipped_flow_names",
]
