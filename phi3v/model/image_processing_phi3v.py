"""Cuts images into crops by the HD transform, with pixels equal to those of the official processor.

An image is resized and cut into a grid of h x w square sub-crops. A global crop shows the whole image at the size of
one crop. "Crops" are both. "Tiles" are the sub-crops as uint8: they take little memory, so a DataLoader's worker sends
these to training, and the device makes all crops of them (`crops_of_tiles`).
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from .configuration_phi3v import auto_map, merged_tokens_per_side
from .limits import IMAGES, OF_IMAGE_PROCESSORS, check, refuse_attributes
from .rgb import to_rgb, upright_size

WHITE = (255, 255, 255)


class Phi3VImageProcessor(BaseImageProcessor):
    """Cuts an image into at most `num_crops` square sub-crops and one global crop.

    image_mean, image_std: for each channel, of pixel values between 0 and 1.
    image_size: the side of a crop in pixels; patch_size: the side of the tower's patches in pixels. The Hub's
        preprocessor_config.json does not mention them.
    exif_rotate: whether images are turned upright as their EXIF data say. The official processor does not.
    Raises ValueError for values beyond the rules in `limits`, and if image_size is not a multiple of two patches.
    """

    model_input_names = ["pixel_values", "image_sizes"]

    def __init__(
        self,
        num_crops: int = 1,
        image_mean=(0.48145466, 0.4578275, 0.40821073),
        image_std=(0.26862954, 0.26130258, 0.27577711),
        do_convert_rgb: bool = True,
        image_size: int = 336,
        patch_size: int = 14,
        exif_rotate: bool = False,
        **kwargs,
    ):
        kwargs.pop("num_img_tokens", None)  # follows from the sizes
        kwargs.pop("auto_map", None)
        given = {"num_crops": num_crops, "image_mean": image_mean, "image_std": image_std, "image_size": image_size}
        given |= {"patch_size": patch_size, "do_convert_rgb": do_convert_rgb, "exif_rotate": exif_rotate}
        check(given, IMAGES)
        refuse_attributes(kwargs, type(self), OF_IMAGE_PROCESSORS)
        super().__init__(**kwargs)
        merged_tokens_per_side(image_size, patch_size)  # raises ValueError for sizes that do not fit
        self.num_crops = num_crops
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.do_convert_rgb = do_convert_rgb
        self.image_size = image_size
        self.patch_size = patch_size
        self.exif_rotate = exif_rotate

    @property
    def crop_tokens_per_side(self) -> int:
        """Image tokens along one side of a crop."""
        return merged_tokens_per_side(self.image_size, self.patch_size)

    def resized_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) in pixels to which an image is resized: the largest that `num_crops` sub-crops cover.

        Raises ValueError for an empty image, and for one so thin that its short side would have no pixels.
        """
        if width < 1 or height < 1:
            raise ValueError(f"image of {width} x {height} pixels is empty")
        if width < height:
            return self.resized_size(height, width)[::-1]
        ratio = width / height
        scale = 1
        while (scale + 1) * math.ceil((scale + 1) / ratio) <= self.num_crops:
            scale += 1
        new_width = scale * self.image_size
        new_height = int(new_width / ratio)
        if new_height < 1:
            raise ValueError(
                f"image of {width} x {height} pixels is too thin: with num_crops {self.num_crops} its short side "
                f"vanishes; its sides may differ by a factor of at most {new_width}"
            )
        return new_width, new_height

    def crop_grid(self, width: int, height: int) -> tuple[int, int]:
        """The number of sub-crops (down, across) into which an image of this size in pixels is cut."""
        new_width, new_height = self.resized_size(width, height)
        return math.ceil(new_height / self.image_size), math.ceil(new_width / self.image_size)

    def calc_num_image_tokens_from_image_size(self, width: int, height: int) -> int:
        """How many tokens an image of this size in pixels takes in the sequence."""
        return num_image_tokens(*self.crop_grid(width, height), self.crop_tokens_per_side)

    def calc_num_image_tokens(self, images) -> list[int]:
        """`calc_num_image_tokens_from_image_size` of each image, PIL or numpy."""
        return [self.calc_num_image_tokens_from_image_size(*self.size_of(image)) for image in as_list(images)]

    def size_of(self, image) -> tuple[int, int]:
        """(width, height) in pixels of one image, PIL or numpy, after it was turned if `exif_rotate`."""
        return upright_size(to_pil(image), self.exif_rotate)

    def tiles(self, image) -> torch.Tensor:
        """The sub-crops of one image, PIL or numpy, row by row: uint8 (h*w, S, S, 3).

        Raises what `to_rgb`, `resized_size` and `to_pil` raise.
        """
        image = to_pil(image)
        if self.do_convert_rgb:
            image = to_rgb(image, exif_rotate=self.exif_rotate)
        width, height = self.resized_size(*image.size)
        h, w = self.crop_grid(*image.size)
        size = self.image_size
        if image.width < image.height:
            # The official processor turns an upright image before it resizes it, and PIL rounds after each axis. To
            # get the same pixels, the vertical axis is resized first.
            image = image.resize((image.width, height), Image.Resampling.BILINEAR)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        canvas = np.full((h * size, w * size, 3), WHITE, dtype=np.uint8)
        top, left = (h * size - height) // 2, (w * size - width) // 2  # one of them is 0
        canvas[top : top + height, left : left + width] = np.asarray(image)
        return torch.from_numpy(canvas).view(h, size, w, size, 3).transpose(1, 2).reshape(h * w, size, size, 3)

    def crops(self, image) -> torch.Tensor:
        """The crops of one image, PIL or numpy: float32 (1 + h*w, 3, S, S), normalised. The global crop is the first,
        the sub-crops follow row by row."""
        pixels = self.tiles(image).permute(0, 3, 1, 2).contiguous().float().div_(255)
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.image_mean, self.image_std))
        pixels.sub_(mean).div_(std)
        return torch.cat([_overview(pixels, *self.crop_grid(*self.size_of(image)))[None], pixels])

    def crops_of_tiles(self, tiles: torch.Tensor, grids, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The function `crops_of_tiles` of this module, with this processor's mean and standard deviation."""
        return crops_of_tiles(tiles, grids, self.image_mean, self.image_std, dtype)

    def preprocess(self, images, return_tensors=None, **kwargs) -> BatchFeature:
        """One image or a list, PIL or numpy (height, width, 3), in the official layout.

        Returns `pixel_values` float32 (n_images, 1 + num_crops, 3, S, S), where images with fewer crops have zeros at
        the end; `image_sizes` int64 (n_images, 2), the height and width of the resized and padded image; and
        `num_img_tokens`, a list. Raises what `tiles` raises.
        """
        if kwargs:
            raise TypeError(f"unknown arguments {sorted(kwargs)}: set num_crops when the image processor is created")
        images = [to_pil(image) for image in as_list(images)]
        size = self.image_size
        pixel_values = torch.zeros(len(images), 1 + self.num_crops, 3, size, size)
        image_sizes = torch.empty(len(images), 2, dtype=torch.long)
        for i, image in enumerate(images):
            crops = self.crops(image)
            pixel_values[i, : len(crops)] = crops
            h, w = self.crop_grid(*self.size_of(image))
            image_sizes[i] = torch.tensor([h * size, w * size])
        data = {
            "pixel_values": pixel_values,
            "image_sizes": image_sizes,
            "num_img_tokens": self.calc_num_image_tokens(images),
        }
        return BatchFeature(data, tensor_type=return_tensors)

    def __call__(self, images, return_tensors=None, **kwargs) -> BatchFeature:
        return self.preprocess(images, return_tensors=return_tensors, **kwargs)

    def to_dict(self):
        return {
            "auto_map": auto_map("AutoImageProcessor", "AutoProcessor"),
            "do_convert_rgb": self.do_convert_rgb,
            "image_mean": self.image_mean,
            "image_processor_type": type(self).__name__,
            "image_size": self.image_size,
            "image_std": self.image_std,
            "num_crops": self.num_crops,
            "num_img_tokens": self.crop_tokens_per_side**2,
            "patch_size": self.patch_size,
            "processor_class": "Phi3VProcessor",
        } | ({"exif_rotate": True} if self.exif_rotate else {})  # otherwise the file is as on the Hub


def num_image_tokens(h, w, g):
    """How many tokens an image takes in the sequence (Phi-3 technical report, arXiv 2404.14219, and the official code).

    h, w: sub-crops down and across, numbers or tensors of one shape; g: tokens along one side of a crop.
    Each of the h*w sub-crops and the global crop has g*g tokens. A separator ends each of the h*g rows of the
    sub-crops and each of the g rows of the global crop, and one more separator stands between the two.
    """
    return (h * w + 1) * g * g + 1 + (h + 1) * g


def as_list(images) -> list:
    """One image as a list with one element; a list or tuple of images as a list."""
    return list(images) if isinstance(images, (list, tuple)) else [images]


def to_pil(image) -> Image.Image:
    """Returns a PIL image unchanged, and converts a uint8 array.

    The array's shape is (height, width), (height, width, 3) or (height, width, 4).
    Raises TypeError or ValueError for anything else.
    """
    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, np.ndarray):
        raise TypeError(f"an image must be a PIL image or a numpy array, not {type(image).__name__}")
    if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))):
        raise ValueError(
            f"an image array must be uint8 of shape (height, width, 3), not {image.dtype} of shape {image.shape}"
        )
    if image.size == 0:
        raise ValueError(f"image array of shape {image.shape} is empty")
    return Image.fromarray(image)


def crops_of_tiles(tiles: torch.Tensor, grids, mean, std, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Sub-crops of images, as `Phi3VImageProcessor.tiles` makes them → all crops, normalised for the tower.

    tiles: uint8 (n_tiles, S, S, 3), on any device; grids: for each image the number of its sub-crops (down, across);
    mean, std: for each channel. Returns (n_images + n_tiles, 3, S, S): each image's global crop, which is the image
    reduced to the size of a crop, and then its sub-crops.
    """
    size = tiles.shape[1]
    crops = torch.empty(len(grids) + len(tiles), 3, size, size, dtype=torch.float32, device=tiles.device)
    tile, crop = 0, 0
    for h, w in grids:
        own = tiles[tile : tile + h * w].view(h, w, size, size, 3)
        crops[crop + 1 : crop + 1 + h * w].unflatten(0, (h, w)).copy_(own.permute(0, 1, 4, 2, 3))
        crops[crop] = _overview(crops[crop + 1 : crop + 1 + h * w], h, w)
        tile, crop = tile + h * w, crop + 1 + h * w
    # (x / 255 - mean) / std for all crops together. Reducing an image is linear, so it may come before this.
    scale, shift = ([1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)])
    scale, shift = (torch.tensor(v)[:, None, None].to(tiles.device, non_blocking=True) for v in (scale, shift))
    return torch.addcmul(shift, crops, scale, out=crops).to(dtype)


def _overview(subcrops: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """(h*w, 3, S, S) sub-crops → the global crop (3, S, S), the image reduced by bicubic interpolation."""
    canvas = subcrops.unflatten(0, (h, w)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)[None]
    return F.interpolate(canvas, size=subcrops.shape[-2:], mode="bicubic", align_corners=False)[0]
