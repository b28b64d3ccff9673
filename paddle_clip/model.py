"""CLIP's networks, in the order and with the names of OpenAI's model.py.

Learning Transferable Visual Models From Natural Language Supervision, Radford et al. 2021, arXiv:2103.00020.
Shape letters: B batch, C channels, L tokens, D width, H heads, E joint embedding.
"""

import math

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from .errors import require_same_tensors

try:
    from paddle.jit.sot.psdb import in_sot  # whether Paddle simulates this code to make a program of it
except ImportError:  # a Paddle that does not

    def in_sot():
        return False


HALF_PRECISION = (paddle.float16, paddle.bfloat16)


def _uniform(fan_in):
    """PyTorch's default for the weights and biases of Conv2d and Linear: uniform within ±1/√fan_in."""
    bound = fan_in**-0.5
    return paddle.ParamAttr(initializer=nn.initializer.Uniform(-bound, bound))


def _conv(in_channels, out_channels, kernel_size, stride=1, padding=0):
    attr = _uniform(in_channels * kernel_size**2)
    return nn.Conv2D(in_channels, out_channels, kernel_size, stride, padding, weight_attr=attr, bias_attr=False)


def _linear(in_features, out_features):
    return nn.Linear(in_features, out_features, weight_attr=_uniform(in_features), bias_attr=_uniform(in_features))


def _normal(param, std):
    nn.initializer.Normal(0.0, std)(param)


EPSILON = 1e-5
# Paddle's kernels hold epsilon as a float32, 2.5e-13 below 1e-5: enough to show in float64 where a variance is small.
EPSILON_SHORTFALL = EPSILON - float(np.float32(EPSILON))


def _float32_if_half(x):
    return x.astype("float32") if x.dtype in HALF_PRECISION else x


class BatchNorm2D(nn.BatchNorm2D):
    """Batch norm over [B, C, H, W] that computes in float32 for half-precision inputs.

    Its running statistics are buffers, as in PyTorch, so `parameters()` holds what OpenAI's holds. A half-precision
    model keeps this layer in float32: a running variance does not fit float16's range.
    """

    def __init__(self, num_features):
        super().__init__(num_features, momentum=0.9, epsilon=EPSILON)  # Paddle's 0.9 is PyTorch's 0.1
        for name in ("_mean", "_variance"):
            statistic = self._parameters.pop(name)
            self.register_buffer(name, statistic.detach())

    def forward(self, x):
        variance = self._variance
        if x.dtype == paddle.float64 and not self.training:
            variance = variance + EPSILON_SHORTFALL
        y = F.batch_norm(
            _float32_if_half(x),
            self._mean,
            variance,
            self.weight,
            self.bias,
            training=self.training,
            momentum=self._momentum,
            epsilon=self._epsilon,
        )
        return y.astype(x.dtype)


class Bottleneck(nn.Layer):
    """Residual block whose strided convolutions are an average pool and a stride of 1 (OpenAI's `Bottleneck`)."""

    expansion = 4

    def __init__(self, inplanes, planes, stride=1):
        super().__init__()
        self.conv1 = _conv(inplanes, planes, 1)
        self.bn1 = BatchNorm2D(planes)
        self.conv2 = _conv(planes, planes, 3, padding=1)
        self.bn2 = BatchNorm2D(planes)
        self.avgpool = nn.AvgPool2D(stride) if stride > 1 else None
        self.conv3 = _conv(planes, planes * self.expansion, 1)
        self.bn3 = BatchNorm2D(planes * self.expansion)
        self.downsample = None
        if stride > 1 or inplanes != planes * self.expansion:
            self.downsample = nn.Sequential(
                ("-1", nn.AvgPool2D(stride)),
                ("0", _conv(inplanes, planes * self.expansion, 1)),
                ("1", BatchNorm2D(planes * self.expansion)),
            )

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)  # [B, 4P, H/s, W/s]
        x = F.relu(self.bn1(self.conv1(x)))  # [B, P, H, W]
        x = F.relu(self.bn2(self.conv2(x)))  # [B, P, H, W]
        if self.avgpool is not None:
            x = self.avgpool(x)  # [B, P, H/s, W/s]
        x = self.bn3(self.conv3(x))  # [B, 4P, H/s, W/s]
        return F.relu(x + identity)


def swap(x):
    """[N, A, B, D] -> [N, B, A, D], in its own memory.

    Paddle's `transpose` is a view, which the next operation copies number by number, or in Paddle 2 such a copy itself:
    on the CPU it took as long as the products around it. Shuffling channels moves whole rows of D.
    """
    # x.place would break `paddle.jit.to_static`, and so would groups that a simulated program does not know.
    if paddle.in_dynamic_mode() and not in_sot() and paddle.get_device() == "cpu":
        n, a, b, d = x.shape
        return F.channel_shuffle(x.reshape([n, a * b, d, 1]), a).reshape([n, b, a, d])
    return x.transpose([0, 2, 1, 3])


def token(x, at):
    """[B, L, D] -> [B, 1, D]: the token at one place for all rows, an int, or at one for each, [B] int64."""
    if isinstance(at, int):
        return x[:, at : at + 1]
    rows = paddle.arange(x.shape[0])  # [B]
    return paddle.gather_nd(x, paddle.stack([rows, at], axis=-1)).unsqueeze(1)


def causal_mask(length, dtype, at=None):
    """The most that scores may be where no query sees a later token: inf, and -inf for the later ones.

    It is no summand, as Paddle Inference would fuse that with the product before it, and take seven times as long.

    Args:
        length: tokens L.
        dtype: of the scores.
        at: place of the only query of each row, [B] int64; by default there is a query at each of L places.

    Returns:
        [L, L], or [B, 1, 1, L] for the queries `at` a place.
    """
    places = paddle.arange(length)  # [L]
    queries = places if at is None else at.reshape([-1, 1, 1])  # [L] or [B, 1, 1]
    later = places > queries.unsqueeze(-1)  # [L, L] or [B, 1, 1, L]
    return paddle.where(later, paddle.full([], -math.inf, dtype), paddle.full([], math.inf, dtype))


def attention(q, k, v, heads, mask=None):
    """Multi-head scaled dot-product attention between already projected tokens.

    Args:
        q: queries [B, Lq, D].
        k: keys [B, L, D].
        v: values [B, L, D].
        heads: number of heads H; D is a multiple of it.
        mask: what `causal_mask` returns; by default every query sees all tokens.

    Returns:
        [B, Lq, D] in the dtype of `q`.
    """
    width = q.shape[-1]
    q, k, v = (tokens.reshape([0, 0, heads, width // heads]) for tokens in (q, k, v))  # [B, L, H, D/H]
    one_for_all_rows = mask is None or mask.ndim == 2
    if q.dtype in HALF_PRECISION and one_for_all_rows:  # which runs on GPUs alone, and there as flash attention
        x = F.scaled_dot_product_attention(q, k, v, is_causal=mask is not None)  # [B, Lq, H, D/H]
        return x.reshape([0, 0, width])

    scores = paddle.matmul(swap(q) * (width // heads) ** -0.5, swap(k), transpose_y=True)  # [B, H, Lq, L]
    if mask is not None:
        scores = paddle.minimum(scores, mask)
    x = paddle.matmul(F.softmax(scores, axis=-1), swap(v))  # [B, H, Lq, D/H]
    return swap(x).reshape([0, 0, width])  # [B, Lq, D]


def attention_of_one(q, x, k_weight, v_weight, v_bias, heads, mask=None):
    """`attention` of one query in each row to tokens not yet projected, for static graphs.

    q·(Wx) = (Wᵀq)·x and ∑a(Wx) = W∑ax: the weights meet each query and not each token. The bias of the keys adds the
    same to all scores of a query, and softmax drops it. Where the program is loaded the weights are rearranged, once;
    in dynamic mode that would take longer than what is saved.

    Args:
        q: queries [B, 1, D].
        x: tokens [B, L, D].
        k_weight, v_weight: of the projections to keys and values, [D, D].
        v_bias: [D].
        heads: number of heads H; D is a multiple of it.
        mask: what `causal_mask` returns; by default every query sees all tokens.

    Returns:
        [B, 1, D].
    """
    width = q.shape[-1]
    size = width // heads
    k_weight, v_weight = (weight.reshape([width, heads, size]) for weight in (k_weight, v_weight))  # [D, H, D/H]
    q = (q * size**-0.5).reshape([-1, heads, size]).transpose([1, 0, 2])  # [H, B, D/H]
    q = paddle.matmul(q, k_weight.transpose([1, 2, 0])).transpose([1, 0, 2])  # [B, H, D]
    scores = paddle.matmul(q, x, transpose_y=True)  # [B, H, L]
    if mask is not None:
        scores = paddle.minimum(scores, mask.squeeze(1))
    x = paddle.matmul(F.softmax(scores, axis=-1), x).transpose([1, 0, 2])  # [H, B, D]
    x = paddle.matmul(x, v_weight.transpose([1, 0, 2])).transpose([1, 0, 2])  # [B, H, D/H]
    return x.reshape([-1, 1, width]) + v_bias


def project(x, weight):
    """x @ weight: [B, D] @ [D, E] -> [B, E], in the dtype of `x`.

    The weight is transposed twice. For fewer than eight rows MKL would add up the D products one by one, at four times
    the rounding error of PyTorch; along contiguous columns it adds them in parts.
    """
    return paddle.matmul(x, weight.astype(x.dtype).t(), transpose_y=True)


class AttentionPool2D(nn.Layer):
    """Pools a feature map by attention from its mean (OpenAI's `AttentionPool2d`; paper, section 2.4).

    [B, D, S, S] -> [B, E], where S is `spacial_dim`. The mean is the only query, so only one is computed.
    """

    def __init__(self, spacial_dim, embed_dim, num_heads, output_dim=None):
        super().__init__()
        self.positional_embedding = self.create_parameter(
            [spacial_dim**2 + 1, embed_dim], default_initializer=nn.initializer.Normal(0.0, embed_dim**-0.5)
        )
        self.k_proj = _linear(embed_dim, embed_dim)
        self.q_proj = _linear(embed_dim, embed_dim)
        self.v_proj = _linear(embed_dim, embed_dim)
        self.c_proj = _linear(embed_dim, output_dim or embed_dim)
        self.num_heads = num_heads

    def forward(self, x):
        x = x.flatten(2)  # [B, D, S*S]
        x = paddle.concat([x.mean(axis=2, keepdim=True), x], axis=2).transpose([0, 2, 1])  # [B, S*S+1, D]
        x = x + self.positional_embedding.astype(x.dtype)
        q, k, v = self.q_proj(x[:, :1]), self.k_proj, self.v_proj
        if paddle.in_dynamic_mode():
            x = attention(q, k(x), v(x), self.num_heads)  # [B, 1, D]
        else:
            x = attention_of_one(q, x, k.weight, v.weight, v.bias, self.num_heads)  # [B, 1, D]
        return self.c_proj(x.squeeze(1))  # [B, E]


class ModifiedResNet(nn.Layer):
    """ResNet with a three-convolution stem, anti-aliased strides and attention pooling (OpenAI's `ModifiedResNet`).

    [B, 3, R, R] -> [B, E], where R is `input_resolution`.
    """

    def __init__(self, layers, output_dim, heads, input_resolution=224, width=64):
        super().__init__()
        self.output_dim = output_dim
        self.input_resolution = input_resolution

        self.conv1 = _conv(3, width // 2, 3, stride=2, padding=1)
        self.bn1 = BatchNorm2D(width // 2)
        self.conv2 = _conv(width // 2, width // 2, 3, padding=1)
        self.bn2 = BatchNorm2D(width // 2)
        self.conv3 = _conv(width // 2, width, 3, padding=1)
        self.bn3 = BatchNorm2D(width)
        self.avgpool = nn.AvgPool2D(2)

        self.layer1 = self._make_layer(width, width, layers[0])
        self.layer2 = self._make_layer(width * 4, width * 2, layers[1], stride=2)
        self.layer3 = self._make_layer(width * 8, width * 4, layers[2], stride=2)
        self.layer4 = self._make_layer(width * 16, width * 8, layers[3], stride=2)
        self.attnpool = AttentionPool2D(input_resolution // 32, width * 32, heads, output_dim)

    @staticmethod
    def _make_layer(inplanes, planes, blocks, stride=1):
        rest = [Bottleneck(planes * Bottleneck.expansion, planes) for _ in range(1, blocks)]
        return nn.Sequential(Bottleneck(inplanes, planes, stride), *rest)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))  # [B, W/2, R/2, R/2], W the width
        x = F.relu(self.bn2(self.conv2(x)))  # [B, W/2, R/2, R/2]
        x = F.relu(self.bn3(self.conv3(x)))  # [B, W, R/2, R/2]
        x = self.avgpool(x)  # [B, W, R/4, R/4]
        x = self.layer1(x)  # [B, 4W, R/4, R/4]
        x = self.layer2(x)  # [B, 8W, R/8, R/8]
        x = self.layer3(x)  # [B, 16W, R/16, R/16]
        x = self.layer4(x)  # [B, 32W, R/32, R/32]
        return self.attnpool(x)  # [B, E]


class LayerNorm(nn.LayerNorm):
    """Layer norm that computes in float32 for half-precision inputs and in the input's dtype otherwise."""

    def forward(self, x):
        weight, bias = _float32_if_half(self.weight), _float32_if_half(self.bias)
        if x.dtype == paddle.float64:  # norm(x, ε) = norm(cx, c²ε), and the kernel's epsilon is c²ε
            x = x * (1 - EPSILON_SHORTFALL / EPSILON) ** 0.5
        return F.layer_norm(_float32_if_half(x), self._normalized_shape, weight, bias, self._epsilon).astype(x.dtype)


class QuickGELU(nn.Layer):
    """x * sigmoid(1.702 x), the activation the published weights were trained with."""

    def forward(self, x):
        return x * F.sigmoid(1.702 * x)


class MultiHeadAttention(nn.Layer):
    """Self-attention with one fused input projection (the part of PyTorch's `MultiheadAttention` CLIP uses).

    [B, L, D] -> [B, L, D], or [B, 1, D] for the token `at` a place, see `token`.
    """

    def __init__(self, embed_dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        xavier = math.sqrt(6 / (embed_dim + 3 * embed_dim))
        self.in_proj = nn.Linear(
            embed_dim,
            3 * embed_dim,
            weight_attr=paddle.ParamAttr(initializer=nn.initializer.Uniform(-xavier, xavier)),
            bias_attr=paddle.ParamAttr(initializer=nn.initializer.Constant(0.0)),
        )
        self.out_proj = nn.Linear(
            embed_dim,
            embed_dim,
            weight_attr=_uniform(embed_dim),
            bias_attr=paddle.ParamAttr(initializer=nn.initializer.Constant(0.0)),
        )

    def forward(self, x, mask=None, at=None):
        if paddle.in_dynamic_mode():
            q, k, v = self.in_proj(x).chunk(3, axis=-1)  # each [B, L, D]
            q = q if at is None else token(q, at)  # [B, L, D] or [B, 1, D]
            return self.out_proj(attention(q, k, v, self.num_heads, mask))
        # Where the program is loaded the weights are cut, once; cutting each result takes longer. They are slices, as
        # Paddle Inference 3.3 computes NaN with what it makes of `chunk`.
        width = x.shape[-1]
        parts = [slice(start, start + width) for start in (0, width, 2 * width)]
        weights = [self.in_proj.weight[:, part] for part in parts]  # each [D, D]
        biases = [self.in_proj.bias[part] for part in parts]  # each [D]
        q = F.linear(x if at is None else token(x, at), weights[0], biases[0])  # [B, L, D] or [B, 1, D]
        if at is not None:
            return self.out_proj(attention_of_one(q, x, *weights[1:], biases[2], self.num_heads, mask))
        k, v = F.linear(x, weights[1], biases[1]), F.linear(x, weights[2], biases[2])  # each [B, L, D]
        return self.out_proj(attention(q, k, v, self.num_heads, mask))


class ResidualAttentionBlock(nn.Layer):
    """Pre-norm transformer block (OpenAI's `ResidualAttentionBlock`).

    [B, L, D] -> [B, L, D], or [B, 1, D] for the token `at` a place, see `token`.
    """

    def __init__(self, d_model, n_head, activation="quickgelu"):
        super().__init__()
        self.attn = MultiHeadAttention(d_model, n_head)
        self.ln_1 = LayerNorm(d_model)
        self.mlp = nn.Sequential(
            ("c_fc", _linear(d_model, d_model * 4)),
            ("gelu", {"quickgelu": QuickGELU, "gelu": nn.GELU}[activation]()),
            ("c_proj", _linear(d_model * 4, d_model)),
        )
        self.ln_2 = LayerNorm(d_model)

    def forward(self, x, mask=None, at=None):
        attended = self.attn(self.ln_1(x), mask, at)
        x = (x if at is None else token(x, at)) + attended
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Layer):
    """A stack of residual attention blocks (OpenAI's `Transformer`, batch first).

    [B, L, D] -> [B, L, D], or [B, 1, D] for the token `at` a place, see `token`: the last block computes no other.
    """

    def __init__(self, width, layers, heads, activation="quickgelu"):
        super().__init__()
        self.width = width
        self.layers = layers
        self.resblocks = nn.LayerList([ResidualAttentionBlock(width, heads, activation) for _ in range(layers)])

    def forward(self, x, causal=False, at=None):
        *blocks, last = self.resblocks
        mask = causal_mask(x.shape[1], x.dtype) if causal else None  # [L, L]
        for block in blocks:
            x = block(x, mask)
        if causal and at is not None:
            mask = causal_mask(x.shape[1], x.dtype, at)  # [B, 1, 1, L]
        return last(x, mask, at)


class VisualTransformer(nn.Layer):
    """Vision transformer whose feature is its class token (OpenAI's `VisionTransformer`).

    [B, 3, R, R] -> [B, E], where R is `input_resolution`.
    """

    def __init__(self, input_resolution, patch_size, width, layers, heads, output_dim, activation="quickgelu"):
        super().__init__()
        self.input_resolution = input_resolution
        self.output_dim = output_dim
        self.conv1 = _conv(3, width, patch_size, stride=patch_size)

        initializer = nn.initializer.Normal(0.0, width**-0.5)
        tokens = (input_resolution // patch_size) ** 2 + 1
        self.class_embedding = self.create_parameter([width], default_initializer=initializer)
        self.positional_embedding = self.create_parameter([tokens, width], default_initializer=initializer)
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, activation)
        self.ln_post = LayerNorm(width)
        self.proj = self.create_parameter([width, output_dim], default_initializer=initializer)

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose([0, 2, 1])  # [B, L-1, D]
        class_token = self.class_embedding.astype(x.dtype).expand([x.shape[0], 1, -1])  # [B, 1, D]
        x = paddle.concat([class_token, x], axis=1)  # [B, L, D]
        x = self.ln_pre(x + self.positional_embedding.astype(x.dtype))
        x = self.transformer(x, at=0).squeeze(1)  # [B, D]
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
        vocab_size: number of tokens; the highest one is end-of-text.
        transformer_width: width of the text transformer.
        transformer_heads: heads of the text transformer.
        transformer_layers: layers of the text transformer.
        activation: of the transformers' MLPs: "quickgelu", as in OpenAI's models, or "gelu".
    """

    def __init__(
        self,
        embed_dim,
        # vision
        image_resolution,
        vision_layers,
        vision_width,
        vision_patch_size,
        # text
        context_length,
        vocab_size,
        transformer_width,
        transformer_heads,
        transformer_layers,
        activation="quickgelu",
    ):
        super().__init__()
        self.context_length = context_length
        self.vocab_size = vocab_size

        if vision_patch_size is None:
            self.visual = ModifiedResNet(
                vision_layers, embed_dim, vision_width * 32 // 64, image_resolution, vision_width
            )
        else:
            self.visual = VisualTransformer(
                image_resolution,
                vision_patch_size,
                vision_width,
                vision_layers,
                vision_width // 64,
                embed_dim,
                activation,
            )

        self.transformer = Transformer(transformer_width, transformer_layers, transformer_heads, activation)
        self.token_embedding = nn.Embedding(vocab_size, transformer_width)
        self.positional_embedding = self.create_parameter([context_length, transformer_width])
        self.ln_final = LayerNorm(transformer_width)
        self.text_projection = self.create_parameter([transformer_width, embed_dim])
        self.logit_scale = self.create_parameter([], default_initializer=nn.initializer.Constant(math.log(1 / 0.07)))
        self.initialize_parameters()

    def initialize_parameters(self):
        """Draws the weights OpenAI does not leave at PyTorch's defaults (OpenAI's method of this name)."""
        _normal(self.token_embedding.weight, 0.02)
        _normal(self.positional_embedding, 0.01)

        if isinstance(self.visual, ModifiedResNet):
            pool = self.visual.attnpool
            for proj in (pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj):
                _normal(proj.weight, pool.c_proj.weight.shape[0] ** -0.5)  # c_proj's in_features
            for block in self.visual.sublayers():
                if isinstance(block, Bottleneck):
                    nn.initializer.Constant(0.0)(block.bn3.weight)

        width, layers = self.transformer.width, self.transformer.layers
        for block in self.transformer.resblocks:
            _normal(block.attn.in_proj.weight, width**-0.5)
            _normal(block.attn.out_proj.weight, width**-0.5 * (2 * layers) ** -0.5)
            _normal(block.mlp.c_fc.weight, (2 * width) ** -0.5)
            _normal(block.mlp.c_proj.weight, width**-0.5 * (2 * layers) ** -0.5)
        _normal(self.text_projection, width**-0.5)

    @property
    def dtype(self):
        """The dtype the towers compute in: that of the first convolution."""
        return self.visual.conv1.weight.dtype

    def set_state_dict(self, state_dict, use_structured_name=True):
        """Loads weights, or raises `CheckpointError` with everything that does not fit and changes nothing.

        Paddle's own method only warns on a missing, unexpected or misshapen tensor. Floating-point tensors are cast
        to the dtype of the parameter they fill.
        """
        own = self.state_dict()
        if not use_structured_name:
            own = {tensor.name: tensor for tensor in own.values()}
        require_same_tensors(
            expected={name: tuple(tensor.shape) for name, tensor in own.items()},
            found={name: tuple(tensor.shape) for name, tensor in state_dict.items()},
            source="the state dict",
            hint="`paddle_clip.load(file)` builds the model a file was made for; `python presets.py` lists the presets",
        )
        for name, tensor in own.items():
            value = state_dict[name]
            value = value if isinstance(value, paddle.Tensor) else paddle.to_tensor(np.asarray(value))
            tensor.set_value(value.astype(tensor.dtype))
        return [], []  # missing and unexpected, as Paddle's method returns them

    set_dict = load_dict = set_state_dict

    def encode_image(self, image):
        """Image features, not normalised.

        Args:
            image: [B, 3, R, R], as the preprocessing returns it, in any floating-point dtype.

        Returns:
            [B, E] in the model's dtype.

        Raises:
            ValueError: if the image is not [B, 3, R, R].
        """
        expected = [3, self.visual.input_resolution, self.visual.input_resolution]
        if paddle.in_dynamic_mode() and list(image.shape[1:]) != expected:
            raise ValueError(
                f"images are {list(image.shape)}; this model takes [N, {', '.join(map(str, expected))}]: "
                "prepare them with the preprocess that paddle_clip.load() returns, and stack them into a batch"
            )
        return self.visual(image.astype(self.dtype))

    def encode_text(self, text, trim=True):
        """Text features, not normalised.

        Args:
            text: token ids [B, L], int64, L at most the context length, as `tokenize` returns them. The feature is
                read at the highest id of each row: end-of-text.
            trim: whether to leave out what follows the last end-of-text of the batch. No token sees a later one, so
                the result is the same to rounding, and ordinary texts take a sixth of the time. False keeps the shapes
                fixed, as a static graph does.

        Returns:
            [B, E] in the model's dtype.
        """
        end_of_text = text.argmax(axis=-1)  # [B]
        if trim and paddle.in_dynamic_mode():
            text = text[:, : int(end_of_text.max().item()) + 1]  # [B, L]
        x = self.token_embedding(text).astype(self.dtype)  # [B, L, D]
        x = x + self.positional_embedding[: text.shape[1]].astype(x.dtype)
        x = self.transformer(x, causal=True, at=end_of_text).squeeze(1)  # [B, D]
        x = self.ln_final(x)
        return project(x, self.text_projection)  # [B, E]

    def forward(self, image, text):
        """Scaled cosine similarities of every image with every text.

        Args:
            image: [N, 3, R, R], see `encode_image`.
            text: [M, L], see `encode_text`.

        Returns:
            logits_per_image [N, M] and logits_per_text [M, N]; float32 from a half-precision model, whose own steps
            near 20 would be as coarse as 0.125.
        """
        image_features = _float32_if_half(self.encode_image(image))  # [N, E]
        text_features = _float32_if_half(self.encode_text(text))  # [M, E]

        image_features = image_features / image_features.norm(axis=-1, keepdim=True)
        text_features = text_features / text_features.norm(axis=-1, keepdim=True)
        logits_per_image = self.logit_scale.exp() * image_features @ text_features.t()  # [N, M]
        return logits_per_image, logits_per_image.t()
