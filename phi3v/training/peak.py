"""The most memory that the forward and backward pass of a micro-batch take at once."""

from ..model.functional import LOSS_CHUNK
from .costs import PARTS, Costs, base_of, of_part
from .workload import Workload


def peak_bytes(costs: Costs, workload: Workload, dequantised: float = 0.0) -> float:
    """The most that the two passes hold at once, without parameters and their gradients.

    That is the largest of what they hold at four moments: at the end of the forward pass, with a chunk of logits and
    the gradient of the head; in the last decoder layer that computes all tokens, in the forward pass and in the
    backward pass; and in the tower, when nothing is left of what comes after it. Either layer may be one that is
    computed again.

    dequantised: bytes of the largest weight that is kept in 4 bits and dequantised when it is used.
    """
    model, size = costs.model, costs.compute_bytes
    kept = costs.activation_bytes(workload)
    rounded = costs.rounded_bytes - sum(costs.kept_bytes[part] for part in PARTS)  # gone after the forward pass
    end = kept + rounded + min(workload.targets, LOSS_CHUNK) * costs.vocabulary * (2 * size + 4)
    head = base_of(model.lm_head).weight
    if head.requires_grad or any(p.requires_grad for p in model.lm_head.parameters()):
        # From the second chunk on there is the sum of the head's gradients so far as well.
        gradients = head.element_size() * (2 if workload.targets > LOSS_CHUNK else 1)
        end += head.numel() * (gradients + (size if head.element_size() > size else 0))

    before_last = kept - costs.total(costs.kept_last_layer, workload)
    wide = workload.tokens * model.config.intermediate_size * size  # one tensor of the width inside of the MLP
    # In the forward pass there are the gate, "up" and their product, which are kept unless they are computed again. An
    # adapter adds its own result to the first two.
    has_adapters = hasattr(model.model.layers[0].mlp.gate_up_proj, "lora_A")
    in_mlp = (3 if has_adapters else 0) + (3 if costs.checkpointing != "none" else 0)
    forward = before_last + rounded + max(in_mlp * wide, dequantised)
    backward = before_last + costs.total(costs.recomputed_decoder_layer, workload)
    if costs.needs_gradient:
        backward += max(4 * wide, 2 * wide + dequantised)
    if costs.eager:
        backward += workload.pairs // max(workload.groups, 1) * model.config.num_attention_heads * 12

    tower = costs.total(of_part("tower", costs.kept_bytes) + costs.recomputed_tower_layer, workload)
    vision = model.model.vision_embed_tokens
    if any(p.requires_grad for p in vision.parameters()):
        width = vision.img_processor.vision_model.config.intermediate_size
        tower += workload.crops * costs.patches * width * 2 * size
    return max(end, forward, backward, tower)
