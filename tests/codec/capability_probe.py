"""Run as a program: prints a hash of decoded pixels, the file, and a hash of what the network says in float32.

The parent test starts it with ATEN_CPU_CAPABILITY and OPENBLAS_CORETYPE set, which cannot be changed within a process.
"""

import hashlib
import sys

import numpy as np
import torch
from PIL import Image

from quintic.codec import Codec, Curve
from quintic.diffusion import NetworkDenoiser, UNet
from quintic.diffusion.residuals import Residuals


def network() -> NetworkDenoiser:
    """A U-Net with every kind of layer whose weights are random, the zero ones too."""
    arguments = {"shape": (1, 16, 16), "width": 16, "levels": 2, "blocks": 1, "patch": 2, "heads": 2}
    net = UNet(**arguments, initialize=False)
    generator = torch.Generator().manual_seed(0)
    for tensor in net.parameters():
        # Whole numbers are drawn alike everywhere; torch's normal numbers are not.
        whole = torch.randint(-1000, 1001, tensor.shape, generator=generator)
        tensor.data = whole.float() / (600.0 * (tensor[0].numel() if tensor.ndim > 1 else 4) ** 0.5)
    return NetworkDenoiser(net, "x0", arguments)


def sha(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def main(threads: int, batch: int) -> None:
    torch.set_num_threads(threads)
    denoiser = network()
    residuals = Residuals(((60, *[300] * 20),) * 5, (tuple(900 // (1 + i) for i in range(64)),) * 5)
    codec = Codec(denoiser, curve=Curve(tuple(40 * i for i in range(81)), residuals), preset="fast", batch=batch)
    picture = Image.linear_gradient("L").resize((16, 18))
    data = codec.encode(picture, target_bytes=70, exact=True)
    x = torch.linspace(-1.0, 1.0, 256).view(1, 1, 16, 16)
    print(sha(np.asarray(codec.decode(data))), data.hex(), sha(denoiser.predict_x0(x, 1.0).numpy()))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
