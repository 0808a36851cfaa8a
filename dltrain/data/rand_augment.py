"""RandAugment: Cubuk et al. 2019, https://arxiv.org/abs/1909.13719, section 3, on whole micro-batches of uint8.

The 14 operations give Pillow's results (ImageOps, ImageEnhance, transforms with nearest pixels), in integers where
Pillow's are. Each gets `level` = M / 10, and where it has a direction a sign per row. All grow with the level: the
authors' code has posterize and solarize weaken, and enhances up or down by M alone; here as in torchvision.

Shapes: B rows, R of them that are given one operation, C = 3 channels, H height, W width, N operations in a row.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dltrain.data.draws import uniform

Op = Callable[[Tensor, float, np.ndarray, int], Tensor]  # images_RCHW, level, sign_R, fill -> images_RCHW


def rand_augment(images_BCHW: Tensor, keys_B: Tensor, n: int = 2, m: float = 9.0, fill: int = 128) -> Tensor:
    """`n` operations on each row, drawn with replacement, at magnitude `m` of 10; uint8 in and out.

    `keys_B`: the rows' keys. `fill`: the value of pixels from outside the image.
    """
    u_BN2 = uniform(keys_B.cpu().numpy(), "rand_augment", 2 * n).reshape(-1, n, 2)
    op_BN, sign_BN = (u_BN2[..., 0] * len(OPS)).astype(np.int64), np.where(u_BN2[..., 1] < 0.5, -1.0, 1.0)
    images_BCHW = images_BCHW.clone()
    for i in range(n):
        for o, op in enumerate(OPS):
            if op is not identity and len(row_R := np.flatnonzero(op_BN[:, i] == o)):
                rows = torch.from_numpy(row_R).to(images_BCHW.device)
                images_BCHW[rows] = op(images_BCHW[rows], m / 10, sign_BN[row_R, i], fill)
    return images_BCHW


def identity(images_RCHW: Tensor, level: float, sign_R: np.ndarray, fill: int) -> Tensor:
    return images_RCHW


def autocontrast(images_RCHW: Tensor, level: float, sign_R: np.ndarray, fill: int) -> Tensor:
    """Each channel stretched to 0 ... 255."""
    low_RC, high_RC = images_RCHW.amin((2, 3)).double()[..., None], images_RCHW.amax((2, 3)).double()[..., None]
    scale_RC1 = torch.full_like(low_RC, 255.0) / (high_RC - low_RC).clamp(min=1)  # 255.0 / x would be 255 (1 / x)
    value_256 = torch.arange(256, device=images_RCHW.device, dtype=torch.float64)
    table_RC256 = (value_256 * scale_RC1 - low_RC * scale_RC1).clamp(0, 255)
    return _look_up(torch.where(high_RC > low_RC, table_RC256, value_256), images_RCHW)


def equalize(images_RCHW: Tensor, level: float, sign_R: np.ndarray, fill: int) -> Tensor:
    """Each channel's histogram flattened."""
    R, C, H, W = images_RCHW.shape
    channel_RC11 = torch.arange(R * C, device=images_RCHW.device).view(R, C, 1, 1)
    count_RC256 = torch.bincount((images_RCHW + 256 * channel_RC11).flatten(), minlength=R * C * 256).view(R, C, 256)
    last_RC = count_RC256.gather(2, images_RCHW.amax((2, 3)).long()[..., None])
    step_RC1 = (H * W - last_RC) // 255
    before_RC256 = count_RC256.cumsum(2) - count_RC256
    table_RC256 = (before_RC256 + step_RC1 // 2) // step_RC1.clamp(min=1)
    value_256 = torch.arange(256, device=images_RCHW.device)
    return _look_up(torch.where(step_RC1 > 0, table_RC256, value_256).clamp(max=255), images_RCHW)


def _look_up(table_RC256: Tensor, images_RCHW: Tensor) -> Tensor:
    return table_RC256.byte().gather(2, images_RCHW.flatten(2).long()).view(images_RCHW.shape)


def rotate(images_RCHW: Tensor, level: float, sign_R: np.ndarray, fill: int) -> Tensor:
    """By up to 30 degrees, about the centre."""
    H, W = images_RCHW.shape[2:]
    angle_R = np.radians(30 * level * sign_R)
    cos_R, sin_R = np.cos(angle_R), np.sin(angle_R)
    x, y = W / 2, H / 2
    rows = [cos_R, -sin_R, x - x * cos_R + y * sin_R, sin_R, cos_R, y - x * sin_R - y * cos_R]
    return _affine(images_RCHW, np.stack(rows, 1), fill)


def shear_x(images_RCHW: Tensor, level: float, sign_R: np.ndarray, fill: int) -> Tensor:
    """By up to 0.3, about the upper left corner."""
    return _affine(images_RCHW, _matrices(sign_R, {1: 0.3 * level}), fill)


def shear_y(images_RCHW: Tensor, level: float, sign_R: np.ndarray, fill: int) -> Tensor:
    return _affine(images_RCHW, _matrices(sign_R, {3: 0.3 * level}), fill)


def translate_x(images_RCHW: Tensor, level: float, sign_R: np.ndarray, fill: int) -> Tensor:
    """By up to 150/331 of the width (AutoAugment's 150 pixels of 331)."""
    return _affine(images_RCHW, _matrices(sign_R, {2: 150 / 331 * level * images_RCHW.shape[3]}), fill)


def translate_y(images_RCHW: Tensor, level: float, sign_R: np.ndarray, fill: int) -> Tensor:
    return _affine(images_RCHW, _matrices(sign_R, {5: 150 / 331 * level * images_RCHW.shape[2]}), fill)


def _matrices(sign_R: np.ndarray, entries: dict[int, float]) -> np.ndarray:
    """float64 [R, 6]: the identity with the sign times `entries`."""
    matrix_R6 = np.tile([1.0, 0.0, 0.0, 0.0, 1.0, 0.0], (len(sign_R), 1))
    for place, value in entries.items():
        matrix_R6[:, place] = sign_R * value
    return matrix_R6


def _affine(images_RCHW: Tensor, matrix_R6: np.ndarray, fill: int) -> Tensor:
    """Pixel (x, y) takes the one at (a x + b y + c, d x + e y + f); 16 bits of fraction, as Pillow's `affine_fixed`."""
    R, C, H, W = images_RCHW.shape
    matrix_R6[:, [2, 5]] += 0.5 * (matrix_R6[:, [0, 3]] + matrix_R6[:, [1, 4]])  # pixels' centres are at half
    fixed_R6 = torch.from_numpy(np.floor(matrix_R6 * 65536 + 0.5).astype(np.int64)).to(images_RCHW.device)
    a, b, c, d, e, f = fixed_R6[:, :, None, None].unbind(1)
    y_H1, x_W = torch.arange(H, device=images_RCHW.device)[:, None], torch.arange(W, device=images_RCHW.device)
    x_RHW, y_RHW = (a * x_W + (b * y_H1 + c)) >> 16, (d * x_W + (e * y_H1 + f)) >> 16
    outside_RHW = (x_RHW < 0) | (x_RHW >= W) | (y_RHW < 0) | (y_RHW >= H)
    first_R11 = torch.arange(0, R * H * W, H * W, device=images_RCHW.device)[:, None, None]
    place_RHW = (y_RHW * W + x_RHW + first_R11).masked_fill(outside_RHW, 0)
    pixels_PC = images_RCHW.permute(0, 2, 3, 1).reshape(-1, C)  # whole pixels move
    moved_RHWC = pixels_PC.index_select(0, place_RHW.flatten()).view(R, H, W, C)
    return moved_RHWC.masked_fill(outside_RHW[..., None], fill).permute(0, 3, 1, 2)


def solarize(images_RCHW: Tensor, level: float, sign_R: np.ndarray, fill: int) -> Tensor:
    """Invert what is at least 256 (1 - level)."""
    return torch.where(images_RCHW < 256 * (1 - level), images_RCHW, 255 - images_RCHW)


def posterize(images_RCHW: Tensor, level: float, sign_R: np.ndarray, fill: int) -> Tensor:
    """Keep the upper 8 - 4 level bits."""
    return images_RCHW & (256 - (1 << round(4 * level)))


def color(images_RCHW: Tensor, level: float, sign_R: np.ndarray, fill: int) -> Tensor:
    """Away from grey, or towards it."""
    return _blend(_grey(images_RCHW), images_RCHW, level, sign_R)


def contrast(images_RCHW: Tensor, level: float, sign_R: np.ndarray, fill: int) -> Tensor:
    """Away from the mean grey, or towards it."""
    grey_R1HW = _grey(images_RCHW)
    total_R = grey_R1HW.sum((1, 2, 3), dtype=torch.int64)
    pixels = grey_R1HW[0].numel()
    mean_R111 = ((2 * total_R + pixels) // (2 * pixels)).view(-1, 1, 1, 1)
    return _blend(mean_R111, images_RCHW, level, sign_R)


def brightness(images_RCHW: Tensor, level: float, sign_R: np.ndarray, fill: int) -> Tensor:
    """Away from black, or towards it."""
    return _blend(torch.zeros((), device=images_RCHW.device), images_RCHW, level, sign_R)


def sharpness(images_RCHW: Tensor, level: float, sign_R: np.ndarray, fill: int) -> Tensor:
    """Away from the image smoothed by (1 1 1, 1 5 1, 1 1 1) / 13, or towards it; the outermost pixels stay."""
    H, W = images_RCHW.shape[2:]
    if H < 3 or W < 3:
        return images_RCHW
    x_RCHW = images_RCHW.int()
    three = x_RCHW[..., :-2, :] + x_RCHW[..., 1:-1, :] + x_RCHW[..., 2:, :]
    nine = three[..., :-2] + three[..., 1:-1] + three[..., 2:]
    smooth_RCHW = x_RCHW.clone()
    smooth_RCHW[..., 1:-1, 1:-1] = (2 * (nine + 4 * x_RCHW[..., 1:-1, 1:-1]) + 13) // 26
    return _blend(smooth_RCHW, images_RCHW, level, sign_R)


def _grey(images_RCHW: Tensor) -> Tensor:
    """ITU-R 601-2 luma in Pillow's integers: int32 [R, 1, H, W]."""
    red, green, blue = images_RCHW.int().split(1, dim=1)
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


def _blend(base: Tensor, images_RCHW: Tensor, level: float, sign_R: np.ndarray) -> Tensor:
    """base + (1 + 0.9 sign level) (image - base), cut to 0 ... 255."""
    factor_R111 = torch.from_numpy(1 + 0.9 * level * sign_R).float().to(images_RCHW.device).view(-1, 1, 1, 1)
    base = base.float()
    return (base + factor_R111 * (images_RCHW.float() - base)).clamp(0, 255).byte()


OPS: tuple[Op, ...] = (
    identity,
    autocontrast,
    equalize,
    rotate,
    solarize,
    color,
    posterize,
    contrast,
    brightness,
    sharpness,
    shear_x,
    shear_y,
    translate_x,
    translate_y,
)
