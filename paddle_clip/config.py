"""The sizes of a CLIP model, and how its pictures are prepared."""

from dataclasses import dataclass
from typing import NamedTuple, Optional, Union

ACTIVATIONS = ("quickgelu", "gelu")
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of red, green and blue, OpenAI's
STD = (0.26862954, 0.26130258, 0.27577711)
TEXT_TOWERS = ("clip", "bert")
INTERPOLATIONS = ("bicubic", "bilinear")
RESIZE_MODES = ("shortest", "longest", "squash")


class Preprocessing(NamedTuple):
    """How a model's pictures are prepared: the arguments of `image_transform` by name. The defaults are OpenAI's."""

    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    interpolation: str = INTERPOLATIONS[0]
    resize_mode: str = RESIZE_MODES[0]
    fill_color: int = 0  # of the borders that "longest" adds, 0 to 255


def default_preprocessing(text_tower: str) -> Preprocessing:
    """How pictures are prepared where nothing tells it: OpenAI's way, or cn_clip's for its models."""
    return Preprocessing(resize_mode="squash") if text_tower == "bert" else Preprocessing()


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of a CLIP model; the arguments of `CLIP` by name."""

    embed_dim: int  # width of the joint embedding; 0 for a tower alone that has no projection to it
    # vision
    image_resolution: int  # side of the square input image, in pixels
    vision_layers: Union[tuple[int, int, int, int], int]  # blocks of the four ResNet stages, or transformer layers
    vision_width: int  # of the ResNet stem or the vision transformer; 0 for a text tower alone
    vision_patch_size: Optional[int]  # pixels; None for a ResNet
    # text
    transformer_width: int  # 0 for an image tower alone
    transformer_heads: int
    transformer_layers: int = 12
    context_length: int = 77  # tokens
    vocab_size: int = 49408
    activation: str = ACTIVATIONS[0]  # "quickgelu", which OpenAI's models have, or "gelu", as most of open_clip's
    # A text's feature is read at the first token of this id; None: at the highest id, as in OpenAI's models.
    eos_token_id: Optional[int] = None
    # What is equal in all of OpenAI's models.
    vision_head_width: int = 64  # of the vision transformer, or of a ResNet's attention pool
    vision_mlp_width: Optional[int] = None  # of the vision transformer; None: four times its width
    transformer_mlp_width: Optional[int] = None  # of the text transformer; None: four times its width
    text_tower: str = TEXT_TOWERS[0]  # OpenAI's transformer, or "bert" in Chinese-CLIP
    text_positions: Optional[int] = None  # rows of BERT's table of positions; None: as many as the context length

    @property
    def is_vit(self) -> bool:
        """Whether the image tower is a vision transformer; otherwise it is a ResNet."""
        return self.vision_patch_size is not None

    @property
    def has_image(self) -> bool:
        """Whether there is an image tower."""
        return self.vision_width > 0

    @property
    def vision_heads(self) -> int:
        """Heads of the vision transformer, or of a ResNet's attention pool."""
        return (self.vision_width if self.is_vit else self.vision_width * 32) // self.vision_head_width

    @property
    def has_text(self) -> bool:
        """Whether there is a text tower."""
        return self.transformer_width > 0
