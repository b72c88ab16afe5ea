"""Phi-3.5-vision as a library. Importing it registers its classes with transformers' Auto classes."""

from . import installed  # noqa: F401 (first, because it checks the versions of what the others import)

# isort: split
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoVideoProcessor,
)

from .model.configuration_phi3v import Phi3VConfig
from .model.image_processing_phi3v import Phi3VImageProcessor
from .model.modeling_phi3v import Phi3VForCausalLM
from .model.processing_phi3v import Phi3VProcessor

AutoConfig.register("phi3_v", Phi3VConfig)
AutoModelForCausalLM.register(Phi3VConfig, Phi3VForCausalLM)
AutoModelForImageTextToText.register(Phi3VConfig, Phi3VForCausalLM)
AutoImageProcessor.register(
    Phi3VConfig, image_processor_classes=dict.fromkeys(("pil", "torchvision"), Phi3VImageProcessor)
)
AutoProcessor.register(Phi3VConfig, Phi3VProcessor)
# There is none. Without this line `pipeline` would look for one on the Hub, and ask whether to run code from there.
AutoVideoProcessor.register(Phi3VConfig, video_processor_classes={})

__all__ = ["Phi3VConfig", "Phi3VForCausalLM", "Phi3VImageProcessor", "Phi3VProcessor"]
