"""The sizes of a CLIP model."""

from dataclasses import dataclass
from typing import Optional, Union

ACTIVATIONS = ("quickgelu", "gelu")


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of a CLIP model; the arguments of `CLIP` by name."""

    embed_dim: int  # width of the joint embedding
    # vision
    image_resolution: int  # side of the square input image, in pixels
    vision_layers: Union[tuple[int, int, int, int], int]  # blocks of the four ResNet stages, or transformer layers
    vision_width: int  # of the ResNet stem or the vision transformer
    vision_patch_size: Optional[int]  # pixels; None for a ResNet
    # text
    transformer_width: int
    transformer_heads: int
    transformer_layers: int = 12
    context_length: int = 77  # tokens
    vocab_size: int = 49408
    activation: str = ACTIVATIONS[0]  # "quickgelu", which OpenAI's models have, or "gelu", as most of open_clip's

    @property
    def is_vit(self) -> bool:
        """Whether the image tower is a vision transformer; otherwise it is a ResNet."""
        return self.vision_patch_size is not None
