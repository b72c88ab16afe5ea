"""What older versions of packages, of those that requirements.txt allows, name differently or lack."""

from types import ModuleType

import torch
from huggingface_hub.utils import _http

# The HTTP client of huggingface_hub: httpx2 from version 2.0 on. Both packages can be installed at the same time.
httpx = getattr(_http, "httpx2", None) or _http.httpx


def accelerator_memory() -> ModuleType:
    """The module with the accelerator's memory_allocated, max_memory_allocated, reset_peak_memory_stats, empty_cache.

    torch.accelerator has them from torch 2.9 on. Before, each kind of device has a module with them, as torch.cuda.
    """
    return torch.accelerator if hasattr(torch.accelerator, "max_memory_allocated") else torch.get_device_module()
