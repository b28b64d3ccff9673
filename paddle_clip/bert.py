"""Chinese-CLIP: OpenAI's image tower beside BERT, with the names and in the order of cn_clip's modeling_bert.py.

Chinese CLIP: Contrastive Vision-Language Pretraining in Chinese, Yang et al. 2022, arXiv:2211.01335.
BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding, Devlin et al. 2018, arXiv:1810.04805.

Dropout, which cn_clip's BERT has in training, is left out: OpenAI's models have none, and `finetune` runs the towers
twice, which must give the same numbers.
Shape letters as in model.py: B batch, L tokens, D width, H heads, E joint embedding.
"""

from typing import Optional

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from .layers import (
    LayerNorm,
    attention,
    attention_of_one,
    default,
    has_hooks,
    is_traced,
    may_read_weights,
    normal_,
    padding_bound,
    size,
    zeros,
)
from .model import CLIP

EPSILON = 1e-12  # of BERT's norms
TOKEN_TYPES = 2  # rows of the table of token types, of which texts for CLIP have the first
INITIAL_STD = 0.02


def dense(in_features: int, out_features: int) -> nn.Linear:
    """A linear layer whose bias begins at 0 and whose weight `ChineseCLIP` draws."""
    return nn.Linear(in_features, out_features, weight_attr=default(), bias_attr=zeros())


class BertEmbeddings(nn.Layer):
    """The sum of a word's, a position's and a type's embedding, normalised: [B, L] -> [B, L, D]."""

    def __init__(self, vocab_size: int, positions: int, width: int):
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, width, weight_attr=default())
        self.position_embeddings = nn.Embedding(positions, width, weight_attr=default())
        self.token_type_embeddings = nn.Embedding(TOKEN_TYPES, width, weight_attr=default())
        self.LayerNorm = LayerNorm(width, EPSILON)

    def forward(self, text: Tensor) -> Tensor:
        places = paddle.arange(size(text, 1))  # [L]
        x = self.word_embeddings(text) + self.position_embeddings(places)  # [B, L, D]
        return self.LayerNorm(x + self.token_type_embeddings(paddle.zeros_like(text)))


class BertSelfAttention(nn.Layer):
    """Attention between tokens, before its output projection."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = dense(width, width)
        self.key = dense(width, width)
        self.value = dense(width, width)

    def forward(self, x: Tensor, bound: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]; `bound` is what `padding_bound` returns."""
        return attention(self.query(x), self.key(x), self.value(x), self.heads, bound=bound)[0]

    def of_first(self, x: Tensor, bound: Tensor) -> Tensor:
        """What `forward` gives for the first token, for traced programs: [B, L, D] -> [B, 1, D]."""
        q = self.query(x[:, :1])  # [B, 1, D]
        if may_read_weights(self.key, self.value):
            return attention_of_one(q, x, self.key.weight, self.value.weight, self.value.bias, self.heads, bound)
        return attention(q, self.key(x), self.value(x), self.heads, bound=bound)[0]


class BertOutput(nn.Layer):
    """A linear layer whose result is added to what the attention, or the MLP, began with, and normalised.

    cn_clip's `BertSelfOutput` and `BertOutput`.
    """

    def __init__(self, in_features: int, width: int):
        super().__init__()
        self.dense = dense(in_features, width)
        self.LayerNorm = LayerNorm(width, EPSILON)

    def forward(self, x: Tensor, identity: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + identity)


class BertAttention(nn.Layer):
    """Attention and its output projection: [B, L, D] -> [B, L, D]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.self = BertSelfAttention(width, heads)
        self.output = BertOutput(width, width)

    def forward(self, x: Tensor, bound: Tensor) -> Tensor:
        return self.output(self.self(x, bound), x)

    def of_first(self, x: Tensor, bound: Tensor) -> Tensor:
        """What `forward` gives for the first token: [B, L, D] -> [B, 1, D]."""
        return self.output(self.self.of_first(x, bound), x[:, :1])


class BertIntermediate(nn.Layer):
    """The hidden layer of the MLP, with the exact GELU."""

    def __init__(self, width: int, mlp_width: int):
        super().__init__()
        self.dense = dense(width, mlp_width)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class BertLayer(nn.Layer):
    """Post-norm transformer block: [B, L, D] -> [B, L, D]."""

    def __init__(self, width: int, heads: int, mlp_width: int):
        super().__init__()
        self.attention = BertAttention(width, heads)
        self.intermediate = BertIntermediate(width, mlp_width)
        self.output = BertOutput(mlp_width, width)

    def forward(self, x: Tensor, bound: Tensor) -> Tensor:
        x = self.attention(x, bound)
        return self.output(self.intermediate(x), x)

    def of_first(self, x: Tensor, bound: Tensor) -> Tensor:
        """What `forward` gives for the first token: [B, L, D] -> [B, 1, D]."""
        x = self.attention.of_first(x, bound)
        return self.output(self.intermediate(x), x)


class BertEncoder(nn.Layer):
    """A stack of blocks."""

    def __init__(self, width: int, layers: int, heads: int, mlp_width: int):
        super().__init__()
        self.layer = nn.LayerList([BertLayer(width, heads, mlp_width) for _ in range(layers)])

    def forward(self, x: Tensor, bound: Tensor) -> list[Tensor]:
        """The tokens before the first block and after each one: [B, L, D] each."""
        states = [x]
        for layer in self.layer:
            states.append(layer(states[-1], bound))
        return states


class BertModel(nn.Layer):
    """BERT without its pooler. A token sees all tokens of its text that are no padding, which has the id 0.

    Args:
        vocab_size: number of tokens.
        positions: longest text in tokens.
        width: width D.
        layers: number of blocks.
        heads: number of heads H.
        mlp_width: hidden width of the MLPs; None: 4D.
    """

    def __init__(
        self, vocab_size: int, positions: int, width: int, layers: int, heads: int, mlp_width: Optional[int] = None
    ):
        super().__init__()
        self.embeddings = BertEmbeddings(vocab_size, positions, width)
        self.encoder = BertEncoder(width, layers, heads, mlp_width or 4 * width)

    @property
    def dtype(self) -> paddle.dtype:
        """The dtype the blocks compute in; embeddings and norms of half-precision models stay in float32."""
        # Not `dense.weight`: an adapter in its place need not have a weight of its own.
        return self.encoder.layer[0].intermediate.dense.parameters()[0].dtype

    def hidden_states(self, text: Tensor) -> list[Tensor]:
        """All tokens before the first block and after each one: [B, L] -> [B, L, D] each."""
        x = self.embeddings(text).astype(self.dtype)
        return self.encoder(x, padding_bound(text, x.dtype))

    def forward(self, text: Tensor) -> Tensor:
        """All tokens after the last block: [B, L] -> [B, L, D]."""
        return self.hidden_states(text)[-1]

    def first(self, text: Tensor) -> Tensor:
        """The first token after the last block: [B, L] -> [B, 1, D].

        In traced programs the last block computes no other token, unless a hook is there to see them.
        """
        *layers, last = self.encoder.layer
        if not is_traced() or has_hooks(self, self.encoder, last, last.attention, last.attention.self):
            return self(text)[:, :1]
        x = self.embeddings(text).astype(self.dtype)
        bound = padding_bound(text, x.dtype)
        for layer in layers:
            x = layer(x, bound)
        return last.of_first(x, bound)


class ChineseCLIP(CLIP):
    """OpenAI's image tower and BERT (cn_clip's `CLIP`). The arguments are those of `CLIP`; it has no `transformer`.

    The feature of a text is its first token's. `activation` is that of the image tower: BERT's is the exact GELU.

    Attributes:
        bert: the text tower.
    """

    text_tower = "bert"

    def _build_text(self) -> None:
        config, width = self.config, self.config.transformer_width
        self.bert = BertModel(
            config.vocab_size,
            config.text_positions or config.context_length,
            width,
            config.transformer_layers,
            config.transformer_heads,
            config.transformer_mlp_width,
        )
        self.text_projection = self._projection(width)

    def initialize_parameters(self) -> None:
        """Draws the weights that cn_clip does not leave at PyTorch's defaults."""
        self._initialize_image()
        if not self.config.has_text:
            return
        for layer in self.bert.sublayers():
            if isinstance(layer, (nn.Linear, nn.Embedding)):
                normal_(layer.weight, INITIAL_STD)
        if self.text_projection is not None:
            normal_(self.text_projection, self.config.transformer_width**-0.5)

    def _text_dtype(self) -> paddle.dtype:
        return self.bert.dtype

    def _embedding(self) -> nn.Layer:
        return self.bert.embeddings.word_embeddings

    def _positions(self) -> int:
        return self.bert.embeddings.position_embeddings.weight.shape[0]

    def _lengths(self, text: Tensor) -> Tensor:
        places = paddle.arange(1, text.shape[1] + 1)  # [L]
        return (places * (text != 0).astype(places.dtype)).max(axis=-1).clip(min=1)

    def _read(self, text: Tensor) -> Tensor:
        return self.bert.first(text)

    def hidden_states(self, text: Tensor) -> list[Tensor]:
        """All text tokens before BERT's first block and after each one: [B, L] -> [B, L, D] each."""
        return self.bert.hidden_states(text)

    def forward_features(self, text: Tensor) -> Tensor:
        """All text tokens after BERT's last block (Hugging Face's `last_hidden_state`): [B, L] -> [B, L, D]."""
        return self.bert(text)
