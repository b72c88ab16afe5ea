"""The stages of gpu_report.py about right results."""

import torch
from report_models import image_processor
from report_parts import Check, LeftOut, Row, Setting, at_most

from phi3v.model.image_processing_phi3v import crops_of_tiles

Found = list[Check | Row | LeftOut]


def crops(setting: Setting) -> Found:
    """Crops normalised on the device against those of the CPU."""
    processor, random, found = image_processor(setting), torch.Generator().manual_seed(0), []
    side = processor.image_size
    statistics = processor.image_mean, processor.image_std
    for grids in ([(1, 1)], [(4, 4)], [(1, 2), (3, 5), (2, 1)]):
        shape = (sum(h * w for h, w in grids), side, side, 3)
        tiles = torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)
        there = crops_of_tiles(tiles.to(setting.device), grids, *statistics).cpu()
        here = crops_of_tiles(tiles, grids, *statistics)
        name = "crops of " + ", ".join(f"{h}x{w}" for h, w in grids)
        difference = (there - here).abs().max()
        found.append(at_most(name, difference, 1e-4, "crops are normalised differently on the device and on the CPU"))
    return found
