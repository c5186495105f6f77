"""CLIP's picture and text towers (Radford et al. 2021, arXiv 2103.00020).

Attribute names are Hugging Face's, which Stable Diffusion and Paint by Example files carry (`pre_layrnorm` included);
OpenAI's own files come through a table in `pbe.checkpoints`. One set of classes serves ViT-L/14, ViT-B/32 and ViT-B/16.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pbe.models.attention import attention

# mean and standard deviation of the pictures CLIP was trained on, by channel, for values in [0, 1]
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Activation = Literal["quick_gelu", "gelu"]  # OpenAI trained with the first, open_clip mostly with the other


def check_heads(width: int, num_heads: int) -> None:
    """ValueError unless attention of this width divides into heads."""
    if width % num_heads:
        raise ValueError(f"{width} channels do not divide into num_heads={num_heads}")


@dataclass(frozen=True)
class CLIPVisionConfig:
    """Sizes of `CLIPVisionTower`; the defaults are those of ViT-L/14 at 224 pixels."""

    width: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    patch_size: int = 14
    image_size: int = 224
    mlp_width: int = 4096
    activation: Activation = "quick_gelu"

    def __post_init__(self) -> None:
        check_heads(self.width, self.num_heads)

    @property
    def num_positions(self) -> int:
        """Patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclass(frozen=True)
class CLIPTextConfig:
    """Sizes of `CLIPTextTower`; the defaults are those of ViT-L/14, which Stable Diffusion v1 uses."""

    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    vocab_size: int = 49408
    context_length: int = 77
    mlp_width: int = 3072
    activation: Activation = "quick_gelu"

    def __post_init__(self) -> None:
        check_heads(self.width, self.num_heads)


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of `CLIP`; `embed_dim` is the width of the space that both towers share."""

    vision: CLIPVisionConfig = CLIPVisionConfig()
    text: CLIPTextConfig = CLIPTextConfig()
    embed_dim: int = 768


def quick_gelu(x: Tensor) -> Tensor:
    """The approximation of GELU that CLIP was trained with: x sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


class CLIPAttention(nn.Module):
    """Multi-head self-attention of x (B, N, C); `is_causal` hides later positions."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, is_causal: bool) -> Tensor:
        # (B, N, C) -> (B, heads, N, C / heads)
        q, k, v = (
            proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = attention(q, k, v, is_causal)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class CLIPMLP(nn.Module):
    def __init__(self, width: int, mlp_width: int, activation: Activation):
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(quick_gelu(x) if self.activation == "quick_gelu" else F.gelu(x))


class CLIPLayer(nn.Module):
    """Attention and a two-layer network, each after a LayerNorm and around a skip."""

    def __init__(self, config: CLIPVisionConfig | CLIPTextConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width)
        self.self_attn = CLIPAttention(config.width, config.num_heads)
        self.layer_norm2 = nn.LayerNorm(config.width)
        self.mlp = CLIPMLP(config.width, config.mlp_width, config.activation)

    def forward(self, x: Tensor, is_causal: bool) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), is_causal)
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nn.Module):
    def __init__(self, config: CLIPVisionConfig | CLIPTextConfig):
        super().__init__()
        self.layers = nn.ModuleList(CLIPLayer(config) for _ in range(config.num_layers))

    def forward(self, x: Tensor, is_causal: bool = False, which: slice = slice(None)) -> Tensor:
        for layer in list(self.layers)[which]:
            x = layer(x, is_causal)
        return x


class CLIPVisionEmbeddings(nn.Module):
    """Cuts pictures into patches and adds the class token and the positions."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.image_size = config.image_size
        self.class_embedding = nn.Parameter(torch.empty(config.width))
        nn.init.normal_(self.class_embedding, std=config.width**-0.5)
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, config.patch_size, bias=False)
        self.position_embedding = nn.Embedding(config.num_positions, config.width)

    def forward(self, image: Tensor) -> Tensor:
        if image.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"this CLIP tower takes pictures of {self.image_size}x{self.image_size} pixels, "
                f"not {image.shape[-1]}x{image.shape[-2]} (width x height)"
            )
        patches = self.patch_embedding(image).flatten(2).transpose(1, 2)  # (B, N - 1, C)
        cls = self.class_embedding.expand(image.shape[0], 1, -1)
        return torch.cat([cls, patches], dim=1) + self.position_embedding.weight


class CLIPVisionTower(nn.Module):
    """CLIP's vision transformer."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.config = config
        self.embeddings = CLIPVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.width)
        self.encoder = CLIPEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.width)

    def tokens(self, image: Tensor) -> Tensor:
        """All tokens (B, N, width) of CLIP-normalised pictures (B, 3, S, S): class token first, no last norm."""
        return self.last_layer(self.early_tokens(image))

    def early_tokens(self, image: Tensor) -> Tensor:
        """As `tokens`, before the last layer: what its class token attends to."""
        return self.encoder(self.pre_layrnorm(self.embeddings(image)), which=slice(-1))

    def last_layer(self, tokens: Tensor) -> Tensor:
        """`tokens` of `early_tokens`."""
        return self.encoder(tokens, which=slice(-1, None))

    def forward(self, image: Tensor) -> Tensor:
        """The class token (B, width), normalised, of CLIP-normalised pictures (B, 3, S, S)."""
        return self.post_layernorm(self.tokens(image)[:, 0])


class CLIPTextEmbeddings(nn.Module):
    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.context_length, config.width)

    def forward(self, token_ids: Tensor) -> Tensor:
        N = token_ids.shape[1]
        if N > self.position_embedding.num_embeddings:
            raise ValueError(f"{N} tokens, but this tower reads at most {self.position_embedding.num_embeddings}")
        return self.token_embedding(token_ids) + self.position_embedding.weight[:N]


class CLIPTextTower(nn.Module):
    """CLIP's causal text transformer."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.config = config
        self.embeddings = CLIPTextEmbeddings(config)
        self.encoder = CLIPEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.width)

    def forward(self, token_ids: Tensor) -> Tensor:
        """All tokens (B, N, width), normalised, of token ids (B, N): Stable Diffusion v1's context."""
        return self.final_layer_norm(self.encoder(self.embeddings(token_ids), is_causal=True))

    def pooled(self, token_ids: Tensor) -> Tensor:
        """The token (B, width) at the first end of text, which has the vocabulary's highest id."""
        end = token_ids.argmax(dim=-1)
        return self(token_ids)[torch.arange(len(end), device=end.device), end]


class CLIP(nn.Module):
    """Both towers and their projections into one space."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        self.vision_model = CLIPVisionTower(config.vision)
        self.text_model = CLIPTextTower(config.text)
        self.visual_projection = nn.Linear(config.vision.width, config.embed_dim, bias=False)
        self.text_projection = nn.Linear(config.text.width, config.embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))  # ln(1 / 0.07), the paper's temperature

    def encode_image(self, image: Tensor) -> Tensor:
        """Embeddings (B, embed_dim), not normalised, of CLIP-normalised pictures (B, 3, S, S)."""
        return self.visual_projection(self.vision_model(image))

    def encode_text(self, token_ids: Tensor) -> Tensor:
        """Embeddings (B, embed_dim), not normalised, of token ids (B, N)."""
        return self.text_projection(self.text_model.pooled(token_ids))

    def forward(self, image: Tensor, token_ids: Tensor) -> Tensor:
        """Logits (B_image, B_text): the cosine similarities times exp(logit_scale)."""
        image_features = F.normalize(self.encode_image(image), dim=-1)
        text_features = F.normalize(self.encode_text(token_ids), dim=-1)
        return self.logit_scale.exp() * image_features @ text_features.T
