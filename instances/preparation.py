"""Converts images from files to the inputs of a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cbs_opt.errors import InstanceError, UsageError


@dataclass(frozen=True)
class Preparation:
    """Scale, normalise and lay out images.

    Whole numbers (uint8) are divided by `scale`; floating images are taken as scaled to [0, 1] already, and
    refused elsewhere. Then (x − mean) / std per channel. The channels, in the order red, green, blue, may come
    last or first and leave first.

    Parameters
    ----------
    image_shape : tuple of int or None
        (H, W) for grey images, (H, W, C) for colour; None takes any.
    mean, std : tuple of float
        One number for all channels, or one per channel.
    scale : float
        The largest value of a pixel in whole numbers.
    flat : bool
        Return (m, H·W·C) instead of (m, C, H, W).
    """

    image_shape: tuple[int, ...] | None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    scale: float = 255.0
    flat: bool = False

    def __post_init__(self) -> None:
        channels = self.image_shape[2] if self.image_shape is not None and len(self.image_shape) == 3 else 1
        for name, values in (("mean", self.mean), ("std", self.std)):
            if self.image_shape is not None and len(values) not in (1, channels):
                raise UsageError(
                    f"`{name}` must be one number{f' or {channels}' if channels > 1 else ''}, one per channel, "
                    f"got {len(values)}"
                )
        if not all(torch.isfinite(torch.tensor(values)).all() for values in (self.mean, self.std)):
            raise UsageError("`mean` and `std` must be finite numbers")
        if min(self.std) <= 0:
            raise UsageError(f"`std` must be above 0, got {min(self.std):g}")

    def __call__(self, images: Tensor) -> Tensor:
        """The input of the network.

        Parameters
        ----------
        images : uint8 or float (m, H, W), (m, H, W, C), (m, C, H, W), or (m, H·W) for grey images

        Returns
        -------
        float32 (m, C, H, W), or (m, C·H·W) with `flat`

        Raises
        ------
        InstanceError
            For images of another shape, or floating images outside [0, 1].
        """
        images = self._channels_first(images)
        if images.is_floating_point():
            if len(images) and (float(images.min()) < 0 or float(images.max()) > 1):
                raise InstanceError(
                    "images in floating point must lie in [0, 1] (whole numbers, 0 to "
                    f"{self.scale:g}, are scaled), got values from {float(images.min()):g} to "
                    f"{float(images.max()):g}"
                )
            x = images.to(torch.float32)
        else:
            x = images.to(torch.float32) / self.scale
        channels = x.shape[1]
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise UsageError(f"`{name}` has {len(values)} numbers, the images have {channels} channels")
        x = (x - torch.tensor(self.mean).reshape(1, -1, 1, 1)) / torch.tensor(self.std).reshape(1, -1, 1, 1)
        return x.flatten(1) if self.flat else x

    def _channels_first(self, images: Tensor) -> Tensor:
        """The images as (m, C, H, W), whatever their order of axes."""
        found, wanted = tuple(images.shape[1:]), self.image_shape
        if wanted is None:
            if len(found) == 2:
                return images.unsqueeze(1)
            if len(found) == 3:
                return images if found[0] in (1, 3) and found[2] not in (1, 3) else images.permute(0, 3, 1, 2)
            raise InstanceError(f"images must have two or three axes, got shape {found}")
        if len(wanted) == 2:
            if found in (wanted, (wanted[0] * wanted[1],), (*wanted, 1), (1, *wanted)):
                return images.reshape(len(images), 1, *wanted)
        elif found == wanted:
            return images.permute(0, 3, 1, 2)
        elif found == (wanted[2], *wanted[:2]):
            return images
        raise InstanceError(
            f"the network takes images of shape {' × '.join(map(str, wanted))}, got "
            f"{' × '.join(map(str, found)) or 'single numbers'}"
        )

    def normalised(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> Preparation:
        """The same preparation with another mean or standard deviation."""
        return Preparation(
            self.image_shape,
            self.mean if mean is None else tuple(float(value) for value in mean),
            self.std if std is None else tuple(float(value) for value in std),
            self.scale,
            self.flat,
        )
