"""CLIP's networks, in the order and with the names of OpenAI's model.py.

Learning Transferable Visual Models From Natural Language Supervision, Radford et al. 2021, arXiv:2103.00020.

In dynamic mode each class computes what OpenAI's class of that name computes, batch first. In traced programs the last
block of a transformer computes only the token that is read.
Shape letters: B batch, C channels, L tokens, D width, H heads, E joint embedding.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Optional, Union

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from .arrays import as_tensor
from .checks import require_images, require_tokens
from .config import CLIPConfig, default_preprocessing
from .layers import (
    AvgPool2D,
    BatchNorm2D,
    LayerNorm,
    MultiHeadAttention,
    Place,
    add_,
    attention,
    attention_of_one,
    causal_bound,
    conv,
    default,
    few_rows,
    float32_if_half,
    has_hooks,
    is_traced,
    linear,
    load_strictly,
    may_read_weights,
    mean,
    normal,
    normal_,
    project,
    relu_,
    size,
    token,
)
from .threads import keep_memory, use_cores
from .tokenizer import token_ids


class Bottleneck(nn.Layer):
    """Residual block whose strided convolutions are an average pool and a stride of 1 (OpenAI's `Bottleneck`)."""

    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int = 1):
        super().__init__()
        self.conv1 = conv(inplanes, planes, 1)
        self.bn1 = BatchNorm2D(planes)
        self.conv2 = conv(planes, planes, 3, padding=1)
        self.bn2 = BatchNorm2D(planes)
        self.avgpool = AvgPool2D(stride) if stride > 1 else None
        self.conv3 = conv(planes, planes * self.expansion, 1)
        self.bn3 = BatchNorm2D(planes * self.expansion)
        self.downsample = None
        if stride > 1 or inplanes != planes * self.expansion:
            self.downsample = nn.Sequential(
                ("-1", AvgPool2D(stride)),
                ("0", conv(inplanes, planes * self.expansion, 1)),
                ("1", BatchNorm2D(planes * self.expansion)),
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)  # [B, 4P, H/s, W/s]
        x = relu_(self.bn1(self.conv1(x)))  # [B, P, H, W]
        x = relu_(self.bn2(self.conv2(x)))  # [B, P, H, W]
        if self.avgpool is not None:
            x = self.avgpool(x)  # [B, P, H/s, W/s]
        x = self.bn3(self.conv3(x))  # [B, 4P, H/s, W/s]
        return relu_(add_(x, identity))


class AttentionPool2D(nn.Layer):
    """Pools a feature map by attention from its mean (OpenAI's `AttentionPool2d`; paper, section 2.4).

    [B, D, S, S] -> [B, E], where S is `spacial_dim`. The mean is the only query, so only one is computed.
    """

    def __init__(self, spacial_dim: int, embed_dim: int, num_heads: int, output_dim: Optional[int] = None):
        super().__init__()
        self.positional_embedding = self.create_parameter(
            [spacial_dim**2 + 1, embed_dim], default_initializer=normal(embed_dim**-0.5)
        )
        self.k_proj = linear(embed_dim, embed_dim)
        self.q_proj = linear(embed_dim, embed_dim)
        self.v_proj = linear(embed_dim, embed_dim)
        self.c_proj = linear(embed_dim, output_dim or embed_dim)
        self.num_heads = num_heads

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2)  # [B, D, S*S]
        places = self.positional_embedding.shape[0] - 1  # S*S
        x = paddle.concat([mean(x, places), x], axis=2).transpose([0, 2, 1])  # [B, S*S+1, D]
        x = x + self.positional_embedding.astype(x.dtype)
        q, k, v = few_rows(self.q_proj, x[:, :1]), self.k_proj, self.v_proj
        if may_read_weights(k, v):
            x = attention_of_one(q, x, k.weight, v.weight, v.bias, self.num_heads)  # [B, 1, D]
        else:
            x, _ = attention(q, k(x), v(x), self.num_heads)  # [B, 1, D]
        return few_rows(self.c_proj, x.squeeze(1))  # [B, E]


class ModifiedResNet(nn.Layer):
    """ResNet with a three-convolution stem, anti-aliased strides and attention pooling (OpenAI's `ModifiedResNet`).

    [B, 3, R, R] -> [B, E], where R is `input_resolution`.
    """

    def __init__(
        self, layers: Sequence[int], output_dim: int, heads: int, input_resolution: int = 224, width: int = 64
    ):
        super().__init__()
        self.output_dim = output_dim
        self.input_resolution = input_resolution

        self.conv1 = conv(3, width // 2, 3, stride=2, padding=1)
        self.bn1 = BatchNorm2D(width // 2)
        self.conv2 = conv(width // 2, width // 2, 3, padding=1)
        self.bn2 = BatchNorm2D(width // 2)
        self.conv3 = conv(width // 2, width, 3, padding=1)
        self.bn3 = BatchNorm2D(width)
        self.avgpool = AvgPool2D(2)

        self.layer1 = self._make_layer(width, width, layers[0])
        self.layer2 = self._make_layer(width * 4, width * 2, layers[1], stride=2)
        self.layer3 = self._make_layer(width * 8, width * 4, layers[2], stride=2)
        self.layer4 = self._make_layer(width * 16, width * 8, layers[3], stride=2)
        self.attnpool = AttentionPool2D(input_resolution // 32, width * 32, heads, output_dim)

    @staticmethod
    def _make_layer(inplanes: int, planes: int, blocks: int, stride: int = 1) -> nn.Sequential:
        rest = [Bottleneck(planes * Bottleneck.expansion, planes) for _ in range(1, blocks)]
        return nn.Sequential(Bottleneck(inplanes, planes, stride), *rest)

    def hidden_states(self, x: Tensor) -> list[Tensor]:
        """Feature maps after the stem and after each of the four stages (Hugging Face's `hidden_states` of a ResNet).

        [B, 3, R, R] -> [B, W, R/4, R/4], [B, 4W, R/4, R/4], [B, 8W, R/8, R/8], [B, 16W, R/16, R/16] and
        [B, 32W, R/32, R/32], W the width.
        """
        if not is_traced():
            keep_memory()
        x = relu_(self.bn1(self.conv1(x)))  # [B, W/2, R/2, R/2]
        x = relu_(self.bn2(self.conv2(x)))  # [B, W/2, R/2, R/2]
        x = relu_(self.bn3(self.conv3(x)))  # [B, W, R/2, R/2]
        states = [self.avgpool(x)]
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            states.append(stage(states[-1]))
        return states

    def forward_features(self, x: Tensor) -> Tensor:
        """The feature map before the attention pool (timm's method of this name): [B, 3, R, R] -> [B, 32W, S, S]."""
        return self.hidden_states(x)[-1]

    def forward(self, x: Tensor) -> Tensor:
        return self.attnpool(self.forward_features(x))  # [B, E]


class QuickGELU(nn.Layer):
    """x * sigmoid(1.702 x), the activation the published weights were trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * F.sigmoid(1.702 * x)


class ResidualAttentionBlock(nn.Layer):
    """Pre-norm transformer block (OpenAI's `ResidualAttentionBlock`, batch first).

    Args:
        d_model: width D.
        n_head: number of heads H.
        activation: "quickgelu" or "gelu".
        causal: whether no token attends to a later one, as in the text transformer.
        mlp_width: width of the MLP's hidden layer; None: 4D.
    """

    def __init__(
        self,
        d_model: int,
        n_head: int,
        activation: str = "quickgelu",
        causal: bool = False,
        mlp_width: Optional[int] = None,
    ):
        super().__init__()
        mlp_width = mlp_width or d_model * 4
        self.causal = causal
        self.attn = MultiHeadAttention(d_model, n_head)
        self.ln_1 = LayerNorm(d_model)
        self.mlp = nn.Sequential(
            ("c_fc", linear(d_model, mlp_width)),
            ("gelu", {"quickgelu": QuickGELU, "gelu": nn.GELU}[activation]()),
            ("c_proj", linear(mlp_width, d_model)),
        )
        self.ln_2 = LayerNorm(d_model)

    def attention(
        self,
        x: Tensor,
        attn_mask: Optional[Tensor] = None,
        need_weights: bool = False,
        average_attn_weights: bool = True,
        bound: Optional[Tensor] = None,
    ) -> tuple[Tensor, Optional[Tensor]]:
        """Self-attention of normalised tokens, with the block's mask (OpenAI's method of this name).

        Args:
            x: [B, L, D], the output of `ln_1`.
            attn_mask: numbers added to the scores, [L, L], in place of the block's own mask.
            need_weights: whether to return the attention weights.
            average_attn_weights: whether these are averaged over the heads.
            bound: the block's own mask, if the caller has it: what `causal_bound` returns.

        Returns:
            [B, L, D]; and the weights [B, L, L], each head's [B, H, L, L], or None.
        """
        if attn_mask is None and bound is None and self.causal:
            bound = causal_bound(size(x, 1), x.dtype)
        return self.attn(x, x, x, need_weights, attn_mask, average_attn_weights, bound)

    def forward(self, x: Tensor, attn_mask: Optional[Tensor] = None, bound: Optional[Tensor] = None) -> Tensor:
        """[B, L, D] -> [B, L, D]; see `attention` for the masks."""
        x = x + self.attention(self.ln_1(x), attn_mask, bound=bound)[0]
        return x + self.mlp(self.ln_2(x))

    def of_one(self, x: Tensor, at: Place) -> Tensor:
        """What `forward` gives for the token at a place of each row, for traced programs: [B, L, D] -> [B, 1, D]."""
        length = size(x, 1)
        bound = causal_bound(length, x.dtype, at) if self.causal and not isinstance(at, int) else None
        x = token(x, at) + self.attn.of_one(self.ln_1(x), at, bound)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Layer):
    """A stack of residual attention blocks (OpenAI's `Transformer`, batch first).

    Args:
        width: width D.
        layers: number of blocks.
        heads: number of heads H.
        activation: "quickgelu" or "gelu".
        causal: whether no token attends to a later one, as in the text transformer.
        mlp_width: width of the MLPs' hidden layers; None: 4D.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        activation: str = "quickgelu",
        causal: bool = False,
        mlp_width: Optional[int] = None,
    ):
        super().__init__()
        self.width = width
        self.layers = layers
        self.causal = causal
        blocks = [ResidualAttentionBlock(width, heads, activation, causal, mlp_width) for _ in range(layers)]
        self.resblocks = nn.LayerList(blocks)

    def _bound(self, x: Tensor) -> Optional[Tensor]:
        """The mask of all blocks, made once."""
        return causal_bound(size(x, 1), x.dtype) if self.causal else None

    def hidden_states(self, x: Tensor) -> list[Tensor]:
        """The tokens before the first block and after each one (Hugging Face's `hidden_states`): [B, L, D] each."""
        states, bound = [x], self._bound(x)
        for block in self.resblocks:
            states.append(block(states[-1], bound=bound))
        return states

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        bound = self._bound(x)
        for block in self.resblocks:
            x = block(x, bound=bound)
        return x

    def of_one(self, x: Tensor, at: Place) -> Tensor:
        """What `forward` gives for the token at a place of each row: [B, L, D] -> [B, 1, D].

        In traced programs the last block computes no other token, unless a hook is there to see them.
        """
        *blocks, last = self.resblocks
        if paddle.in_dynamic_mode() or has_hooks(self, last, last.attn):
            return token(self(x), at)
        bound = self._bound(x)
        for block in blocks:
            x = block(x, bound=bound)
        return last.of_one(x, at)


class VisualTransformer(nn.Layer):
    """Vision transformer whose feature is its class token (OpenAI's `VisionTransformer`).

    [B, 3, R, R] -> [B, E], where R is `input_resolution`; with `proj = None` [B, D], the feature before the projection.
    """

    def __init__(
        self,
        input_resolution: int,
        patch_size: int,
        width: int,
        layers: int,
        heads: int,
        output_dim: int,
        activation: str = "quickgelu",
        mlp_width: Optional[int] = None,
    ):
        super().__init__()
        self.input_resolution = input_resolution
        self.output_dim = output_dim
        self.conv1 = conv(3, width, patch_size, stride=patch_size)

        initializer = normal(width**-0.5)
        tokens = (input_resolution // patch_size) ** 2 + 1
        self.class_embedding = self.create_parameter([width], default_initializer=initializer)
        self.positional_embedding = self.create_parameter([tokens, width], default_initializer=initializer)
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, activation, mlp_width=mlp_width)
        self.ln_post = LayerNorm(width)
        self.proj = self.create_parameter([width, output_dim], default_initializer=initializer) if output_dim else None

    def _embed(self, x: Tensor) -> Tensor:
        """The tokens the transformer starts with, the class token first: [B, 3, R, R] -> [B, L, D]."""
        if not is_traced():
            keep_memory()
        x = self.conv1(x).flatten(2).transpose([0, 2, 1])  # [B, L-1, D]
        class_token = self.class_embedding.astype(x.dtype).expand([size(x, 0), 1, -1])  # [B, 1, D]
        x = paddle.concat([class_token, x], axis=1)  # [B, L, D]
        return self.ln_pre(x + self.positional_embedding.astype(x.dtype))

    def hidden_states(self, x: Tensor) -> list[Tensor]:
        """All tokens before the first block and after each one, the class token first (Hugging Face's `hidden_states`).

        [B, 3, R, R] -> [B, L, D] each; `ln_post` is not applied.
        """
        return self.transformer.hidden_states(self._embed(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """All tokens after `ln_post`, the class token first (timm's method of this name): [B, 3, R, R] -> [B, L, D]."""
        return self.ln_post(self.transformer(self._embed(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.transformer.of_one(self._embed(x), 0).squeeze(1)  # [B, D]
        x = self.ln_post(x)
        return project(x, self.proj)  # [B, E]


class CLIP(nn.Layer):
    """An image tower and a text tower that meet in one embedding space (OpenAI's `CLIP`).

    Args:
        embed_dim: width E of the joint embedding.
        image_resolution: side R of the square input image, in pixels.
        vision_layers: blocks of the four ResNet stages, or the number of vision transformer layers.
        vision_width: width of the ResNet stem or of the vision transformer.
        vision_patch_size: side of a vision transformer's patch in pixels; None for a ResNet.
        context_length: longest text in tokens.
        vocab_size: number of tokens; the highest one is end-of-text, unless `eos_token_id` is given.
        transformer_width: width of the text transformer.
        transformer_heads: heads of the text transformer.
        transformer_layers: layers of the text transformer.
        activation: activation of the transformers' MLPs: "quickgelu", as in OpenAI's models, or "gelu".
        eos_token_id: a text's feature is read at its first token of this id; None reads it at the highest id.
        vision_head_width: width of a head of the vision transformer, or of a ResNet's attention pool.
        vision_mlp_width: hidden width of the vision transformer's MLPs; None: four times its width.
        transformer_mlp_width: hidden width of the text transformer's MLPs; None: four times its width.
        text_positions: rows of the table of positions, of a `ChineseCLIP`; None: as many as the context length.

    Attributes:
        config: the arguments, a `CLIPConfig`.
        preprocessing: how its pictures are prepared, which `load` takes from the file, and `save` and `export` keep.
        visual: the image tower, a `ModifiedResNet` or a `VisualTransformer`.
        transformer: the text transformer; it is causal.
        logit_scale: 0-d parameter, the logarithm of the factor on cosine similarities.

    A tower alone, the other's width being 0, has neither the other's attributes nor `logit_scale`.
    """

    text_tower = "clip"

    def __init__(
        self,
        embed_dim: int,
        # vision
        image_resolution: int,
        vision_layers: Union[tuple[int, int, int, int], int],
        vision_width: int,
        vision_patch_size: Optional[int],
        # text
        context_length: int,
        vocab_size: int,
        transformer_width: int,
        transformer_heads: int,
        transformer_layers: int,
        activation: str = "quickgelu",
        eos_token_id: Optional[int] = None,
        vision_head_width: int = 64,
        vision_mlp_width: Optional[int] = None,
        transformer_mlp_width: Optional[int] = None,
        text_positions: Optional[int] = None,
    ):
        super().__init__()
        use_cores()
        self.config = CLIPConfig(
            embed_dim,
            image_resolution,
            vision_layers,
            vision_width,
            vision_patch_size,
            transformer_width,
            transformer_heads,
            transformer_layers,
            context_length,
            vocab_size,
            activation,
            eos_token_id,
            vision_head_width,
            vision_mlp_width,
            transformer_mlp_width,
            self.text_tower,
            text_positions,
        )
        self.preprocessing = default_preprocessing(self.text_tower)
        self.embed_dim = embed_dim or vision_width or transformer_width
        self.context_length = context_length
        self.vocab_size = vocab_size

        self.visual: Union[ModifiedResNet, VisualTransformer]
        if vision_width and isinstance(vision_layers, int):
            assert vision_patch_size is not None, "a vision transformer has a patch size"
            self.visual = VisualTransformer(
                image_resolution,
                vision_patch_size,
                vision_width,
                vision_layers,
                self.config.vision_heads,
                embed_dim,
                activation,
                vision_mlp_width,
            )
        elif not isinstance(vision_layers, int):
            self.visual = ModifiedResNet(
                vision_layers, embed_dim, self.config.vision_heads, image_resolution, vision_width
            )

        if self.config.has_text:
            self._build_text()
        if self.config.has_image and self.config.has_text:
            initial = nn.initializer.Constant(math.log(1 / 0.07))
            self.logit_scale = self.create_parameter([], default_initializer=initial)
        self.initialize_parameters()

    def _build_text(self) -> None:
        """Makes the text tower."""
        config, width = self.config, self.config.transformer_width
        self.transformer = Transformer(
            width,
            config.transformer_layers,
            config.transformer_heads,
            config.activation,
            True,
            config.transformer_mlp_width,
        )
        self.token_embedding = nn.Embedding(config.vocab_size, width, weight_attr=default())
        self.positional_embedding = self.create_parameter([config.context_length, width], attr=default())
        self.ln_final = LayerNorm(width)
        self.text_projection = self._projection(width)

    def _projection(self, width: int) -> Optional[Tensor]:
        embed_dim = self.config.embed_dim
        return self.create_parameter([width, embed_dim], attr=default()) if embed_dim else None

    def initialize_parameters(self) -> None:
        """Draws the weights OpenAI does not leave at PyTorch's defaults (OpenAI's method of this name)."""
        if self.config.has_text:
            normal_(self.token_embedding.weight, 0.02)
            normal_(self.positional_embedding, 0.01)
        self._initialize_image()
        if not self.config.has_text:
            return
        width, layers = self.transformer.width, self.transformer.layers
        for block in self.transformer.resblocks:
            normal_(block.attn.in_proj.weight, width**-0.5)
            normal_(block.attn.out_proj.weight, width**-0.5 * (2 * layers) ** -0.5)
            normal_(block.mlp.c_fc.weight, (2 * width) ** -0.5)
            normal_(block.mlp.c_proj.weight, width**-0.5 * (2 * layers) ** -0.5)
        if self.text_projection is not None:
            normal_(self.text_projection, width**-0.5)

    def _initialize_image(self) -> None:
        visual = self.visual if self.config.has_image else None
        if isinstance(visual, ModifiedResNet):
            pool = visual.attnpool
            for proj in (pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj):
                normal_(proj.weight, pool.c_proj.weight.shape[0] ** -0.5)  # c_proj's in_features
            for block in visual.sublayers():
                if isinstance(block, Bottleneck):
                    block.bn3.zero_()

    def build_attention_mask(self) -> Tensor:
        """The additive causal mask [L, L], L the context length: 0, and -inf for later tokens (OpenAI's method)."""
        return paddle.triu(paddle.full([self.context_length] * 2, -math.inf, self.dtype), 1)

    @property
    def dtype(self) -> paddle.dtype:
        """The dtype the towers compute in: that of the first convolution, or of the first MLP of a text tower alone."""
        # Not `config.has_image`: where Paddle simulates this code, a property of a data class ends the process. And not
        # `conv1.weight`: an adapter in its place need not have a weight of its own.
        return self.visual.conv1.parameters()[0].dtype if self.config.vision_width else self._text_dtype()

    def _text_dtype(self) -> paddle.dtype:
        return self.transformer.resblocks[0].mlp.c_fc.parameters()[0].dtype

    def set_state_dict(
        self, state_dict: Mapping[str, Any], use_structured_name: bool = True
    ) -> tuple[list[str], list[str]]:
        """Loads weights, or raises `CheckpointError` with everything that does not fit and changes nothing.

        Paddle's own method only warns on a missing, unexpected or misshapen tensor. Floating-point tensors are cast
        to the dtype of the parameter they fill.
        """
        load_strictly(self, state_dict, use_structured_name)
        return [], []  # missing and unexpected, as Paddle's method returns them

    set_dict = load_dict = set_state_dict

    def tokenize(self, texts: Union[str, Sequence[str]], truncate: bool = False) -> Tensor:
        """The padded token ids of texts, by the tokenizer that the model was trained with: [N, context length] int64.

        Args:
            texts: one string or a list of N strings.
            truncate: whether to cut texts that are too long, before their end token, instead of raising.

        Raises:
            RuntimeError: if a text is too long and `truncate` is false.
            TypeError: if `texts` is not a string or a list of strings.
        """
        return as_tensor(token_ids(texts, self.context_length, truncate, self.config.text_tower))

    def encode_image(self, image: Tensor) -> Tensor:
        """Computes image features, not normalised.

        Args:
            image: [B, 3, R, R], as the preprocessing returns it, in any floating-point dtype; B may be 0.

        Returns:
            [B, E] in the model's dtype.

        Raises:
            ValueError: if the image is not [B, 3, R, R] or not in floating point, or the model is a text tower alone.
        """
        if is_traced():
            return self.visual(image.astype(self.dtype))
        if not self.config.has_image:
            raise ValueError("this model is a text tower alone: encode_image takes the whole model, or its image tower")
        require_images(image, self.visual.input_resolution)
        image = paddle.to_tensor(image) if isinstance(image, np.ndarray) else image
        image = image.astype(self.dtype)
        if not image.shape[0]:  # which Paddle's kernels refuse
            return self.visual(paddle.zeros([1, *image.shape[1:]], image.dtype))[:0]
        return self.visual(image)

    def _embed(self, text: Tensor) -> Tensor:
        """The tokens the text transformer starts with: [B, L] -> [B, L, D]."""
        x = self.token_embedding(text).astype(self.dtype)
        return x + self.positional_embedding[: size(text, 1)].astype(x.dtype)

    def _embedding(self) -> nn.Layer:
        return self.token_embedding

    def _positions(self) -> int:
        """The longest text in tokens that the weights allow."""
        return self.positional_embedding.shape[0]

    def _end_of_text(self, text: Tensor) -> Tensor:
        """The place of the token that is read in each row: [B, L] -> [B]."""
        eos = self.config.eos_token_id
        return (text if eos is None else (text == eos).astype("int32")).argmax(axis=-1)

    def _lengths(self, text: Tensor) -> Tensor:
        """The number of tokens of each row up to the last that its feature depends on: [B, L] -> [B]."""
        return self._end_of_text(text) + 1

    def _read(self, text: Tensor) -> Tensor:
        """The token that the feature of each row is made of: [B, L] -> [B, 1, D]."""
        end_of_text = self._end_of_text(text)  # [B]
        if is_traced():
            return self.ln_final(self.transformer.of_one(self._embed(text), end_of_text))
        return token(self.forward_features(text), end_of_text)

    def hidden_states(self, text: Tensor) -> list[Tensor]:
        """All text tokens before the first block and after each one (Hugging Face's `hidden_states`).

        Diffusion models read the last but one, `hidden_states(text)[-2]`, some of them after `ln_final`.

        Args:
            text: token ids [B, L], see `encode_text`.

        Returns:
            [B, L, D] each, D the width of the text transformer; `ln_final` is not applied.
        """
        return self.transformer.hidden_states(self._embed(text))

    def forward_features(self, text: Tensor) -> Tensor:
        """All text tokens after `ln_final` (timm's name; Hugging Face's `last_hidden_state`): [B, L] -> [B, L, D]."""
        return self.ln_final(self.transformer(self._embed(text)))

    def encode_text(self, text: Tensor, trim: bool = True) -> Tensor:
        """Computes text features, not normalised.

        Args:
            text: token ids [B, L], int64, L at most the context length, as `tokenize` returns them; B may be 0. The
                feature is read at the highest id of each row, or the first `config.eos_token_id`: end-of-text.
            trim: whether to leave out what follows the last end-of-text of the batch. No token sees a later one, so
                the result is the same to rounding, and ordinary texts take a sixth of the time. False keeps the shapes
                fixed, as hooks on the text tower and static graphs may need.

        Returns:
            [B, E] in the model's dtype.

        Raises:
            ValueError: if the text is not [B, 1 to the context length], or not of ids of the vocabulary, or the model
                is an image tower alone.
        """
        if is_traced():
            return project(self._read(text).squeeze(1), self.text_projection)
        if not self.config.has_text:
            raise ValueError("this model is an image tower alone: encode_text takes the whole model, or its text tower")
        embedding = self._embedding()
        ids = embedding.weight.shape[0] if isinstance(embedding, nn.Embedding) else None  # else not ours
        require_tokens(text, self._positions(), ids)
        keep_memory()
        # Paddle takes uint16 for bfloat16, and has no kernels for other small integers.
        text = paddle.to_tensor(text.astype(np.int64)) if isinstance(text, np.ndarray) else text.astype("int64")
        if not text.shape[0]:  # which Paddle's kernels refuse
            return self.encode_text(paddle.zeros([1, 1], text.dtype))[:0]
        if trim:
            text = text[:, : int(self._lengths(text).max())]  # [B, L]
        return project(self._read(text).squeeze(1), self.text_projection)  # [B, E]

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Computes scaled cosine similarities of every image with every text.

        Args:
            image: [N, 3, R, R], see `encode_image`.
            text: [M, L], see `encode_text`.

        Returns:
            logits_per_image [N, M] and logits_per_text [M, N]; float32 from a half-precision model, whose own steps
            near 20 would be as coarse as 0.125.
        """
        image_features = float32_if_half(self.encode_image(image))  # [N, E]
        text_features = float32_if_half(self.encode_text(text))  # [M, E]
        rows, columns = image_features.shape[0], text_features.shape[0]
        if not is_traced() and rows * columns == 0:  # which Paddle's kernels refuse
            empty = paddle.zeros([rows, columns], image_features.dtype)
            return empty, empty.t()

        image_features = image_features / image_features.norm(axis=-1, keepdim=True)
        text_features = text_features / text_features.norm(axis=-1, keepdim=True)
        logits_per_image = self.logit_scale.exp() * image_features @ text_features.t()  # [N, M]
        return logits_per_image, logits_per_image.t()
