"""What PyTorch has and Paddle lacks, or does slowly: initialisers, norms, masks, attention, strict loading, pickles.

Shape letters: B batch, C channels, L tokens, D width, H heads, E joint embedding.
"""

import contextlib
import copyreg
import math
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Optional, Union

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn
from paddle.base.framework import EagerParamBase

from .arrays import as_array
from .errors import require_same_tensors

try:
    from paddle.jit.sot import psdb
except ImportError:  # a Paddle that simulates nothing
    psdb = None  # type: ignore[assignment]


HALF_PRECISION = (paddle.float16, paddle.bfloat16)
Place = Union[int, Tensor]  # of a token: one for all rows, or one for each, [B] int64


# -------------------------------------------------------------------------------------------------------- initialisers


_draws = ContextVar("draws", default=True)


@contextlib.contextmanager
def undrawn() -> Iterator[None]:
    """New layers hold zeros where they would draw random numbers, which takes longer than loading weights does."""
    before = _draws.set(False)
    try:
        yield
    finally:
        _draws.reset(before)


def normal(std: float) -> nn.initializer.Initializer:
    """A normal distribution of mean 0."""
    return nn.initializer.Normal(0.0, std) if _draws.get() else nn.initializer.Constant(0.0)


def normal_(parameter: Tensor, std: float) -> None:
    """Draws a parameter from a normal distribution of mean 0 (PyTorch's `nn.init.normal_`)."""
    if _draws.get():
        normal(std)(parameter)


def zeros() -> paddle.ParamAttr:
    """The attributes of a parameter that begins at 0."""
    return paddle.ParamAttr(initializer=nn.initializer.Constant(0.0))


def default() -> Optional[paddle.ParamAttr]:
    """The attributes of a parameter that Paddle draws, as a seed has always drawn it; its own draw comes later."""
    return None if _draws.get() else zeros()


def _uniform(bound: float) -> paddle.ParamAttr:
    return paddle.ParamAttr(initializer=nn.initializer.Uniform(-bound, bound)) if _draws.get() else zeros()


def conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0) -> nn.Conv2D:
    """A convolution without bias, with PyTorch's default weights: uniform within ±1/√fan_in."""
    attr = _uniform((in_channels * kernel_size**2) ** -0.5)
    return nn.Conv2D(in_channels, out_channels, kernel_size, stride, padding, weight_attr=attr, bias_attr=False)


def linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear layer with PyTorch's default weights and bias: uniform within ±1/√fan_in."""
    bound = in_features**-0.5
    return nn.Linear(in_features, out_features, weight_attr=_uniform(bound), bias_attr=_uniform(bound))


# --------------------------------------------------------------------------------------------------------------- norms


EPSILON = 1e-5


def shortfall(epsilon: float) -> float:
    """How much less than epsilon Paddle's kernels add, which hold it as a float32.

    For 1e-5 it is 2.5e-13: enough to show in float64 where a variance is small.
    """
    return epsilon - float(np.float32(epsilon))


def float32_if_half(x: Tensor) -> Tensor:
    """A Tensor in float32 if it is in half precision, else as it is."""
    return x.astype("float32") if x.dtype in HALF_PRECISION else x


class BatchNorm2D(nn.BatchNorm2D):
    """Batch norm over [B, C, H, W] that computes in float32 for half-precision inputs.

    Its running statistics are buffers, as in PyTorch, so `parameters()` holds what OpenAI's holds. A half-precision
    model keeps this layer in float32: a running variance does not fit float16's range.
    """

    def __init__(self, num_features: int):
        super().__init__(num_features, momentum=0.9, epsilon=EPSILON)  # Paddle's 0.9 is PyTorch's 0.1
        for name in ("_mean", "_variance"):
            statistic = self._parameters.pop(name)
            self.register_buffer(name, statistic.detach())

    def zero_(self) -> None:
        """Sets the gains to 0, as OpenAI begins the last norm of each residual branch."""
        assert self.weight is not None
        nn.initializer.Constant(0.0)(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        variance = self._variance
        if x.dtype == paddle.float64 and not self.training:
            variance = variance + shortfall(EPSILON)
        y = F.batch_norm(
            float32_if_half(x),
            self._mean,
            variance,
            self.weight,
            self.bias,
            training=self.training,
            momentum=self._momentum,
            epsilon=self._epsilon,
        )
        return y.astype(x.dtype)


class LayerNorm(nn.LayerNorm):
    """Layer norm that computes in float32 for half-precision inputs and in the input's dtype otherwise."""

    def __init__(self, width: int, epsilon: float = EPSILON):
        super().__init__(width, epsilon)

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None and self.bias is not None
        weight, bias = float32_if_half(self.weight), float32_if_half(self.bias)
        if x.dtype == paddle.float64:  # norm(x, ε) = norm(cx, c²ε), and the kernel's epsilon is c²ε
            x = x * (1 - shortfall(self._epsilon) / self._epsilon) ** 0.5
        if not is_traced() and weight.stop_gradient and not x.stop_gradient:
            # On the CPU Paddle leaves a frozen weight out of the gradient of x.
            y = F.layer_norm(float32_if_half(x), self._normalized_shape, None, None, self._epsilon) * weight + bias
        else:
            y = F.layer_norm(float32_if_half(x), self._normalized_shape, weight, bias, self._epsilon)
        return y.astype(x.dtype)


# -------------------------------------------------------------------------------------------------------- feature maps


def relu_(x: Tensor) -> Tensor:
    """ReLU in the memory of `x`, as OpenAI's ResNet computes it; a program has no such operation."""
    return F.relu(x) if is_traced() else F.relu_(x)


def add_(x: Tensor, y: Tensor) -> Tensor:
    """x + y in the memory of `x`, as OpenAI's ResNet adds its branches; a program has no such operation."""
    return x + y if is_traced() else x.add_(y)


def mean(x: Tensor, length: int) -> Tensor:
    """[B, C, L] -> [B, C, 1]. Of a mean in a program Paddle Inference tells on standard output."""
    return x.sum(axis=2, keepdim=True) / length if is_traced() else x.mean(axis=2, keepdim=True)


class AvgPool2D(nn.Layer):
    """Average pool over windows side by side: [B, C, H, W] -> [B, C, H/w, W/w], w the side of a window.

    In dynamic mode windows of 2 are averaged as four slices, in half the time of Paddle's kernel for the CPU.
    """

    def __init__(self, window: int):
        super().__init__()
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        if self.window != 2 or is_traced() or paddle.get_device() != "cpu" or x.shape[2] % 2 or x.shape[3] % 2:
            return F.avg_pool2d(x, self.window)
        top, bottom = x[:, :, ::2], x[:, :, 1::2]  # each [B, C, H/2, W]
        total = add_(top[..., ::2] + top[..., 1::2], bottom[..., ::2])  # [B, C, H/2, W/2]
        return add_(total, bottom[..., 1::2]) / 4


# ---------------------------------------------------------------------------------------------------- tokens and masks


def token(x: Tensor, at: Place) -> Tensor:
    """[B, L, D] -> [B, 1, D]: the token at a place of each row."""
    if isinstance(at, int):
        return x[:, at : at + 1]
    rows = paddle.arange(size(x, 0))  # [B]
    return paddle.gather_nd(x, paddle.stack([rows, at], axis=-1)).unsqueeze(1)


def causal_bound(length: int, dtype: paddle.dtype, at: Optional[Tensor] = None) -> Tensor:
    """Upper bounds of scores by which no query sees a later token: infinite, and -inf for the later ones.

    They are applied with `minimum`: Paddle Inference would fuse an added mask into the product before it, which is
    then seven times slower.

    Args:
        length: number of tokens L.
        dtype: dtype of the scores.
        at: place of the only query of each row, [B] int64; by default there is a query at each of L places.

    Returns:
        [L, L], or [B, 1, 1, L] for the queries `at` a place.
    """
    places = paddle.arange(length)  # [L]
    queries = places if at is None else at.reshape([-1, 1, 1])  # [L] or [B, 1, 1]
    later = places > queries.unsqueeze(-1)  # [L, L] or [B, 1, 1, L]
    return paddle.where(later, paddle.full([], -math.inf, dtype), paddle.full([], math.inf, dtype))


def padding_bound(text: Tensor, dtype: paddle.dtype) -> Tensor:
    """Upper bounds of scores by which no query sees padding, whose id is 0: infinite, and -10,000 for padding.

    BERT adds -10,000 there, after which a weight is 0 in any precision.

    Args:
        text: token ids [B, L].
        dtype: dtype of the scores.

    Returns:
        [B, 1, 1, L].
    """
    bound = paddle.where(text == 0, paddle.full([], -1e4, dtype), paddle.full([], math.inf, dtype))  # [B, L]
    return bound.unsqueeze([1, 2])


def _require_additive(attn_mask: Tensor) -> None:
    if not attn_mask.is_floating_point():
        raise TypeError(
            f"the attention mask is {attn_mask.dtype}; give the additive form, 0 where a query may look and -inf "
            "elsewhere: of boolean masks PyTorch's and Paddle's mean opposite things"
        )


# ----------------------------------------------------------------------------------------------------------- attention


def _in_sot() -> bool:
    """Whether Paddle simulates this code to make a program of it."""
    return psdb is not None and psdb.in_sot()


def is_traced() -> bool:
    """Whether a program is made of this code: shapes may be free then, and there is nothing to check."""
    return not paddle.in_dynamic_mode() or _in_sot()


def size(x: Tensor, axis: int) -> Any:
    """The length of an axis: a number, or a Tensor in a program, where it may be free."""
    return x.shape[axis] if paddle.in_dynamic_mode() else paddle.shape(x)[axis]


def swap(x: Tensor) -> Tensor:
    """[N, A, B, D] -> [N, B, A, D], in its own memory.

    Paddle's `transpose` is a view, which the next operation copies number by number, or in Paddle 2 such a copy itself:
    on the CPU it took as long as the products around it. Shuffling channels moves whole rows of D.
    """
    # x.place would break `paddle.jit.to_static`, and so would groups that a simulated program does not know.
    if paddle.in_dynamic_mode() and not _in_sot() and paddle.get_device() == "cpu":
        n, a, b, d = x.shape
        return F.channel_shuffle(x.reshape([n, a * b, d, 1]), a).reshape([n, b, a, d])
    return x.transpose([0, 2, 1, 3])


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    attn_mask: Optional[Tensor] = None,
    bound: Optional[Tensor] = None,
    need_weights: bool = False,
) -> tuple[Tensor, Optional[Tensor]]:
    """Computes multi-head scaled dot-product attention between tokens that are already projected.

    Args:
        q: queries [B, Lq, D].
        k: keys [B, L, D].
        v: values [B, L, D].
        heads: number of heads H; D is a multiple of it.
        attn_mask: numbers added to the scores, of a shape that broadcasts to [B, H, Lq, L].
        bound: what `causal_bound` returns; by default every query sees all tokens.
        need_weights: whether to return the weights; in half precision they take a slower way.

    Returns:
        [B, Lq, D] in the dtype of `q`, and the weights [B, H, Lq, L], or None where they are not needed.
    """
    width = q.shape[-1]
    q, k, v = (tokens.reshape([0, 0, heads, width // heads]) for tokens in (q, k, v))  # [B, L, H, D/H]
    one_for_all_rows = attn_mask is None and (bound is None or bound.ndim == 2)
    if q.dtype in HALF_PRECISION and one_for_all_rows and not need_weights:  # only GPUs have it, as flash attention
        x = F.scaled_dot_product_attention(q, k, v, is_causal=bound is not None)  # [B, Lq, H, D/H]
        return x.reshape([0, 0, width]), None

    scores = paddle.matmul(swap(q) * (width // heads) ** -0.5, swap(k), transpose_y=True)  # [B, H, Lq, L]
    if attn_mask is not None:
        _require_additive(attn_mask)
        scores = scores + attn_mask.astype(scores.dtype)
    if bound is not None:
        scores = paddle.minimum(scores, bound)
    weights = F.softmax(scores, axis=-1)  # [B, H, Lq, L]
    x = swap(paddle.matmul(weights, swap(v))).reshape([0, 0, width])  # [B, Lq, D]
    return x, weights if need_weights else None


def attention_of_one(
    q: Tensor,
    x: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    v_bias: Tensor,
    heads: int,
    bound: Optional[Tensor] = None,
) -> Tensor:
    """Computes the `attention` of one query in each row to tokens that are not projected yet, for traced programs.

    q·(Wx) = (Wᵀq)·x and ∑a(Wx) = W∑ax: the weights meet each query and not each token. The bias of the keys adds the
    same to all scores of a query, and softmax drops it. Where the program is loaded the weights are rearranged, once;
    in dynamic mode that would take longer than what is saved.

    Args:
        q: queries [B, 1, D].
        x: tokens [B, L, D].
        k_weight: weight of the projection to keys, [D, D].
        v_weight: weight of the projection to values, [D, D].
        v_bias: bias of the projection to values, [D].
        heads: number of heads H; D is a multiple of it.
        bound: what `causal_bound` returns for queries at a place; by default every query sees all tokens.

    Returns:
        [B, 1, D].
    """
    width = q.shape[-1]
    size = width // heads
    k_weight, v_weight = (weight.reshape([width, heads, size]) for weight in (k_weight, v_weight))  # [D, H, D/H]
    q = (q * size**-0.5).reshape([-1, heads, size]).transpose([1, 0, 2])  # [H, B, D/H]
    q = paddle.matmul(q, k_weight.transpose([1, 2, 0])).transpose([1, 0, 2])  # [B, H, D]
    scores = paddle.matmul(q, x, transpose_y=True)  # [B, H, L]
    if bound is not None:
        scores = paddle.minimum(scores, bound.squeeze(1))
    x = paddle.matmul(F.softmax(scores, axis=-1), x).transpose([1, 0, 2])  # [H, B, D]
    x = paddle.matmul(x, v_weight.transpose([1, 0, 2])).transpose([1, 0, 2])  # [B, H, D/H]
    return x.reshape([-1, 1, width]) + v_bias


def may_read_weights(*layers: nn.Layer) -> bool:
    """Whether a program being traced may read the weights of linear layers instead of calling them.

    Not those of a layer that somebody put in place of ours, such as an adapter, nor of one with hooks: they are called.
    """
    if paddle.in_dynamic_mode() or has_hooks(*layers):
        return False
    return all(type(layer) is nn.Linear for layer in layers)


def has_hooks(*layers: nn.Layer) -> bool:
    """Whether a hook watches the call of one of some layers."""
    return any(len(layer._forward_pre_hooks) + len(layer._forward_post_hooks) > 0 for layer in layers)


class MultiHeadAttention(nn.Layer):
    """Multi-head attention with one fused input projection (PyTorch's `nn.MultiheadAttention`, batch first)."""

    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        xavier = _uniform(math.sqrt(6 / (embed_dim + 3 * embed_dim)))
        self.in_proj = nn.Linear(embed_dim, 3 * embed_dim, weight_attr=xavier, bias_attr=zeros())
        self.out_proj = nn.Linear(embed_dim, embed_dim, weight_attr=_uniform(embed_dim**-0.5), bias_attr=zeros())

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = True,
        attn_mask: Optional[Tensor] = None,
        average_attn_weights: bool = True,
        bound: Optional[Tensor] = None,
    ) -> tuple[Tensor, Optional[Tensor]]:
        """Attends from queries to keys and values.

        Args:
            query: [B, Lq, D].
            key: [B, L, D].
            value: [B, L, D].
            need_weights: whether to return the attention weights.
            attn_mask: numbers added to the scores, 0 where a query may look and -inf elsewhere, [Lq, L] or of any
                shape that broadcasts to [B, H, Lq, L].
            average_attn_weights: whether the weights are averaged over the heads.
            bound: what `causal_bound` returns, for callers that share one among blocks.

        Returns:
            [B, Lq, D]; and the weights [B, Lq, L], each head's [B, H, Lq, L], or None.

        Raises:
            TypeError: if the mask is not of floating-point numbers.
        """
        q, k, v = self._project(query, key, value)
        x, weights = attention(q, k, v, self.num_heads, attn_mask, bound, need_weights)
        if weights is not None and average_attn_weights:
            weights = weights.mean(axis=1)  # [B, Lq, L]
        return self.out_proj(x), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, Lq, D], keys and values [B, L, D]."""
        if may_read_weights(self.in_proj):
            # Where the program is loaded the weights are cut, once; cutting each result takes longer.
            (q_weight, k_weight, v_weight), (q_bias, k_bias, v_bias) = self._parts()
            return F.linear(query, q_weight, q_bias), F.linear(key, k_weight, k_bias), F.linear(value, v_weight, v_bias)
        if query is key and key is value:
            return self.in_proj(query).chunk(3, axis=-1)
        return (
            self.in_proj(query).chunk(3, axis=-1)[0],
            self.in_proj(key).chunk(3, axis=-1)[1],
            self.in_proj(value).chunk(3, axis=-1)[2],
        )

    def _parts(self) -> tuple[list[Tensor], list[Tensor]]:
        """The weights, each [D, D], and biases [D] of the projections to queries, keys and values.

        They are slices, as Paddle Inference 3.3 computes NaN with what it makes of `chunk`.
        """
        width = self.in_proj.weight.shape[0]
        parts = [slice(start, start + width) for start in (0, width, 2 * width)]
        return [self.in_proj.weight[:, part] for part in parts], [self.in_proj.bias[part] for part in parts]

    def of_one(self, x: Tensor, at: Place, bound: Optional[Tensor] = None) -> Tensor:
        """Self-attention of the token at a place of each row, for traced programs: [B, L, D] -> [B, 1, D]."""
        if not may_read_weights(self.in_proj):
            q, k, v = self.in_proj(x).chunk(3, axis=-1)  # each [B, L, D]
            return self.out_proj(attention(token(q, at), k, v, self.num_heads, bound=bound)[0])
        weights, biases = self._parts()
        q = F.linear(token(x, at), weights[0], biases[0])  # [B, 1, D]
        return self.out_proj(attention_of_one(q, x, weights[1], weights[2], biases[2], self.num_heads, bound))


_PARTS = 16  # in which the products of few rows are added up


def project(x: Tensor, weight: Optional[Tensor]) -> Tensor:
    """x @ weight: [B, …, D] @ [D, E] -> [B, …, E], in the dtype of `x`; `x` itself if there is no weight.

    MKL adds up the D products of a few rows one by one, at two to four times the rounding error of PyTorch. Here they
    are added up in parts, and in a program along a transposed weight, which is transposed where the program is loaded.
    """
    if weight is None:
        return x
    weight = weight.astype(x.dtype)
    if is_traced() or x.dtype in HALF_PRECISION:
        return paddle.matmul(x, weight.t(), transpose_y=True)
    width, out = weight.shape
    parts = math.gcd(width, _PARTS)  # P
    rows = x.reshape([-1, parts, width // parts]).transpose([1, 0, 2])  # [P, N, D/P]
    sums = paddle.matmul(rows, weight.reshape([parts, width // parts, out]))  # [P, N, E]
    return sums.sum(axis=0).reshape([*x.shape[:-1], out])


def few_rows(layer: nn.Layer, x: Tensor) -> Tensor:
    """layer(x) for one token of each row: [B, …, D] -> [B, …, E]. A linear layer rounds as `project` does."""
    if not is_traced() and type(layer) is nn.Linear and not has_hooks(layer):
        return project(x, layer.weight) + layer.bias
    return layer(x)


# ------------------------------------------------------------------------------------------------------- strict loading

_RELEASE_OVER = 1 << 20  # numbers of a tensor


def load_strictly(
    model: nn.Layer,
    state_dict: Mapping[str, Any],
    use_structured_name: bool = True,
    release: Callable[[], None] = lambda: None,
) -> None:
    """Fills all of a model's tensors, each in its own dtype, or raises and changes nothing.

    Paddle's `set_state_dict` only warns of a missing, unexpected or misshapen tensor.

    Args:
        model: the model to fill.
        state_dict: {name: array or Tensor}.
        use_structured_name: whether the names are those of the state dict; otherwise they are the Tensors' own.
        release: function called from time to time; the arrays read by then are no longer needed.

    Raises:
        CheckpointError: with everything that does not fit.
    """
    own = model.state_dict()
    if not use_structured_name:
        own = {tensor.name: tensor for tensor in own.values()}
    require_same_tensors(
        expected={name: tuple(tensor.shape) for name, tensor in own.items()},
        found={name: tuple(tensor.shape) for name, tensor in state_dict.items()},
        source="the state dict",
        hint="`paddle_clip.load(file)` builds the model a file was made for; `paddle-clip models` lists the presets",
    )
    for name, tensor in own.items():
        _fill(tensor, state_dict[name])
        if math.prod(tensor.shape) > _RELEASE_OVER:
            release()


def _fill(tensor: Tensor, value: Any) -> None:
    """Puts the numbers of an array or Tensor of the same shape into a Tensor, in its dtype."""
    if not isinstance(value, Tensor):
        value = np.ascontiguousarray(value)  # a 0-d array becomes [1]
        if value.dtype.name == str(tensor.dtype).split(".")[-1]:
            tensor.set_value(value.reshape(tensor.shape))
            return
        value = paddle.to_tensor(value)
    tensor.set_value(value.astype(tensor.dtype).reshape(tensor.shape))


# ------------------------------------------------------------------------------------------------------------- pickles


def _reduced(tensor: Tensor) -> tuple[Any, ...]:
    """What makes a Tensor or parameter again, of numpy's arrays alone."""
    names = ("trainable", "optimize_attr", "need_clip") if _is_parameter(tensor) else ("stop_gradient", "persistable")
    kept = {name: getattr(tensor, name) for name in names}
    return _made_again, (as_array(tensor), str(tensor.dtype).split(".")[-1], _is_parameter(tensor), kept)


def _made_again(array: np.ndarray, dtype: Any, is_parameter: bool, kept: dict[str, Any]) -> Tensor:
    tensor = paddle.to_tensor(array).astype(dtype)
    if is_parameter:  # which gets a name of its own
        value, zero = tensor, nn.initializer.Constant(0.0)
        tensor = paddle.create_parameter(value.shape, dtype, default_initializer=zero)
        tensor.set_value(value)
    for name, setting in kept.items():
        setattr(tensor, name, setting)
    return tensor


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, EagerParamBase)


# Layers pickle if their Tensors do. Of a pickled parameter Paddle 3 makes a mere Tensor, and Paddle 2 pickles neither.
copyreg.pickle(EagerParamBase, _reduced)
if paddle.__version__.startswith("2."):
    copyreg.pickle(paddle.Tensor, _reduced)
