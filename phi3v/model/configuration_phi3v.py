"""Configuration of Phi-3.5-vision, a Phi-3 decoder with a CLIP tower. Saved with the keys of the Hub's config.json."""

from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import CLIPVisionConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.phi3.configuration_phi3 import Phi3Config

from ..errors import InputError
from ..files import read_json
from .limits import check_config

# Saved folders name the authors' classes, so that readers of the official format (vLLM is one) recognise them.
_HUB_CLASSES = {
    "AutoConfig": "configuration_phi3_v.Phi3VConfig",
    "AutoModelForCausalLM": "modeling_phi3_v.Phi3VForCausalLM",
    "AutoImageProcessor": "processing_phi3_v.Phi3VImageProcessor",
    "AutoProcessor": "processing_phi3_v.Phi3VProcessor",
}

VIT_L_14_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "projection_dim": 768,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
}

_EMBD_LAYER = {
    "embedding_cls": "image",
    "hd_transform_order": "sub_glb",
    "projection_cls": "mlp",
    "use_hd_transform": True,
    "with_learnable_separator": True,
}

# The decoder's keys in the Hub's config.json. transformers would not save those that have its default values.
_HUB_KEYS = (
    "attention_dropout",
    "bos_token_id",
    "embd_pdrop",
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "original_max_position_embeddings",
    "pad_token_id",
    "resid_pdrop",
    "rms_norm_eps",
    "sliding_window",
    "tie_word_embeddings",
    "use_cache",
    "vocab_size",
)


def auto_map(*auto_classes: str) -> dict[str, str]:
    """The `auto_map` of a saved file: for each Auto class the authors' class on the Hub."""
    return {name: f"microsoft/Phi-3.5-vision-instruct--{_HUB_CLASSES[name]}" for name in auto_classes}


def merged_tokens_per_side(image_size: int, patch_size: int) -> int:
    """Image tokens along one side of a crop after patches are merged 2x2: 12 for 336 pixels and patches of 14.

    Raises ValueError if the crop's side is not a multiple of two patches.
    """
    if image_size % (2 * patch_size):
        raise ValueError(f"image_size {image_size} is not a multiple of 2 x patch_size {patch_size}")
    return image_size // (2 * patch_size)


class Phi3VConfig(Phi3Config):
    """Decoder settings as in `Phi3Config`, and the CLIP tower's in `vision_config`.

    `vision_config` is a `CLIPVisionConfig`, a dict of its settings, or None for ViT-L/14-336, which the Hub's
    config.json does not mention. Its `image_size` is the side of a crop in pixels. `rope_scaling` has the Hub's form
    (`type` "su", `short_factor`, `long_factor`).

    Raises ValueError for a value beyond the rules in `limits`, and if the side of a crop is not a multiple of two
    patches, which are merged 2x2.
    """

    model_type = "phi3_v"
    sub_configs_defaults = {"vision_config": SubConfigSpec(config_class=CLIPVisionConfig, init_kwargs=VIT_L_14_336)}

    max_position_embeddings: int = 131072
    sliding_window: int | None = 262144
    vision_config: dict | CLIPVisionConfig | None = None
    embd_layer: dict | None = None
    img_processor: dict | None = None

    def __new__(cls, **settings):
        check_config(settings, cls)  # before transformers sees them: its errors do not name the value
        return super().__new__(cls)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """The content of a folder's config.json. Raises InputError, which is a ValueError, if it can't be used."""
        file = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "", "config.json")
        try:
            if file.parent.is_dir():  # transformers would wait for a pipe, and overflow at deep nesting
                check_config(read_json(file), cls)
            content, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
            check_config(content, cls)
        except InputError:
            raise
        except ValueError as e:
            raise InputError(f"{file}: {e}") from None
        # The caller decides about the implementation. The Hub's file asks for flash attention, which may not be
        # installed, and a stranger's could name code to be fetched.
        own = {"attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"}
        return {name: value for name, value in content.items() if name not in own}, kwargs

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        try:
            return super().from_dict(config_dict, **kwargs)
        except StrictDataclassError as e:  # transformers' own checks, which raise no ValueError
            raise InputError(f"config.json: {' '.join(str(e).split())}") from None

    def __post_init__(self, **kwargs):
        # The Hub's file asks for flash attention and would fail where that is not installed. The caller of
        # from_pretrained decides instead.
        kwargs.pop("_attn_implementation", None)
        super().__post_init__(**kwargs)
        vision, tokens_per_side = self.vision_config, self.crop_tokens_per_side
        self.embd_layer = self.embd_layer or dict(_EMBD_LAYER)
        self.img_processor = self.img_processor or {
            "image_dim_out": vision.hidden_size,
            "model_name": "openai/clip-vit-large-patch14-336",
            "name": "clip_vision_model",
            "num_img_tokens": tokens_per_side**2,
        }

    @property
    def crop_tokens_per_side(self) -> int:
        """Image tokens along one side of a crop."""
        return merged_tokens_per_side(self.vision_config.image_size, self.vision_config.patch_size)

    def convert_rope_params_to_dict(self, **kwargs):
        rope = kwargs.get("rope_scaling")
        if rope:
            # transformers moves original_max_position_embeddings to where it reads it only for types that it knows,
            # and it does not know "su", an older name of "longrope".
            rope = {key: value for key, value in rope.items() if key != "type"} | {
                "rope_type": rope.get("rope_type", rope.get("type"))
            }
            if rope["rope_type"] == "su":
                rope["rope_type"] = "longrope"
            kwargs["rope_scaling"] = rope
        return super().convert_rope_params_to_dict(**kwargs)

    def to_diff_dict(self):
        """The content of config.json: the Hub's keys under their older names, which new readers understand too."""
        saved = super().to_diff_dict()
        saved.update({key: getattr(self, key) for key in _HUB_KEYS})
        rope = saved.pop("rope_parameters", None) or self.rope_parameters
        saved["rope_theta"] = rope["rope_theta"]
        saved["rope_scaling"] = None
        if rope["rope_type"] == "longrope":
            saved["rope_scaling"] = {
                "type": "su",
                "short_factor": rope["short_factor"],
                "long_factor": rope["long_factor"],
            }
        if (dtype := saved.pop("dtype", None)) is not None:
            saved["torch_dtype"] = dtype
        if all(getattr(self.vision_config, key) == value for key, value in VIT_L_14_336.items()):
            saved.pop("vision_config", None)
        saved["auto_map"] = auto_map("AutoConfig", "AutoModelForCausalLM")
        return saved
