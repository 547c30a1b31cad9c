"""The four models, and the classifier that answers with all of them in one pass.

CNN, ResCNN and ViT take images (batch, 1, 78, 78), float32 in [0, 1]; the stack takes what two of them answer. Each
returns logits (batch, 6).
"""

from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, trunc_normal_
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from hep2.patterns import CLASS_NAMES, IMAGE_SIZE

CLASSES = len(CLASS_NAMES)
SMALLEST = 1e-4  # probability that the stack gives a class


def normalised_convolution(inputs: int, outputs: int, padding: int = 1) -> nn.Sequential:
    # The norm that follows has a shift of its own, so a bias would be idle.
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=padding, bias=False), nn.BatchNorm2d(outputs))


@dataclass(frozen=True, kw_only=True)
class CNNConfig:
    """Widths of the four blocks; the first convolution has the width of the first block."""

    widths: tuple[int, ...] = (32, 64, 128, 256)

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        if len(self.widths) != 4 or any(not isinstance(width, int) or width < 1 for width in self.widths):
            raise ValueError(f"widths is {self.widths}: give four positive whole numbers, one for each block")


class CNN(nn.Module):
    """Nine convolutions, batch norm after each, global average pooling, one linear layer.

    From the reference: a 3x3 convolution with padding 2, then four blocks of two 3x3 convolutions, with ReLU after a
    block's first convolution and norm. It gives neither widths nor the pooling between blocks. Ours: widths
    32-64-128-256 (equal work in every block), 2x2 max pooling before each block, and a ReLU after each block, without
    which the last convolution would be one linear map with the head. The padding of 2 makes 78 an 80, which halves to
    40, 20, 10 and 5 without a remainder.
    """

    Config = CNNConfig
    skips = False

    def __init__(self, config: CNNConfig | None = None) -> None:
        super().__init__()
        self.config = config or self.Config()
        first, *_, last = self.config.widths
        inputs = (first, *self.config.widths[:-1])
        self.stem = normalised_convolution(1, first, padding=2)
        self.blocks = nn.ModuleList(
            ConvolutionBlock(i, o, skip=self.skips) for i, o in zip(inputs, self.config.widths, strict=True)
        )
        self.head = nn.Linear(last, CLASSES)

    def forward_features(self, images: Tensor) -> Tensor:
        features = self.stem(images)  # (batch, 32, 80, 80)
        for block in self.blocks:
            # Pooling first leaves the ReLU a quarter of the work, and the two commute.
            features = block(F.relu(F.max_pool2d(features, 2)))
        return F.relu(features)  # (batch, 256, 5, 5)

    def pool(self, features: Tensor) -> Tensor:
        return features.mean(dim=(2, 3))  # (batch, 256)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.pool(self.forward_features(images)))


class ConvolutionBlock(nn.Module):
    """Two normalised convolutions with a ReLU between, and, for the ResCNN, a skip connection round both."""

    def __init__(self, inputs: int, outputs: int, *, skip: bool) -> None:
        super().__init__()
        self.first = normalised_convolution(inputs, outputs).append(nn.ReLU())
        self.second = normalised_convolution(outputs, outputs)
        self.skip = skip

    def forward(self, features: Tensor) -> Tensor:
        result = self.second(self.first(features))
        if self.skip:
            # New channels start from zero: the skip has no weights, so the network keeps its nine convolutions.
            missing = result.shape[1] - features.shape[1]
            result = result + F.pad(features, (0, 0, 0, 0, 0, missing))
        return result


class ResCNN(CNN):
    """The CNN with a skip connection round each block (He et al. 2016, identity with zero-padded channels)."""

    skips = True


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Shape of the vision transformer; the reference gives no figure but the image size."""

    patch_size: int = 6
    stem_widths: tuple[int, ...] = (24, 48)
    width: int = 128
    depth: int = 4  # 6 in the recipe `default`, where a teacher's answers let a deeper one learn
    heads: int = 4
    mlp_ratio: float = 2.0
    stochastic_depth: float = 0.1
    pooling: Literal["class token", "class token + mean"] = "class token + mean"

    def __post_init__(self) -> None:
        object.__setattr__(self, "stem_widths", tuple(self.stem_widths))
        if self.patch_size < 1 or IMAGE_SIZE % self.patch_size:
            divisors = [size for size in range(1, IMAGE_SIZE + 1) if IMAGE_SIZE % size == 0]
            raise ValueError(f"patch_size {self.patch_size} does not divide {IMAGE_SIZE}: choose one of {divisors}")
        if len(self.stem_widths) not in (0, 2):
            raise ValueError(f"stem_widths is {self.stem_widths}: give two widths, or none for no stem")
        if self.stem_widths and self.patch_size % 2:
            raise ValueError(f"patch_size {self.patch_size} is odd, but the stem halves the image: set stem_widths=()")
        sizes = {"width": self.width, "depth": self.depth, "heads": self.heads}
        if wrong := {name: size for name, size in sizes.items() if not isinstance(size, int) or size < 1}:
            raise ValueError(f"{wrong}: give positive whole numbers")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} cannot be shared out among {self.heads} heads")
        if self.pooling not in ("class token", "class token + mean"):
            raise ValueError(f"pooling is {self.pooling!r}: choose 'class token' or 'class token + mean'")


class ViT(nn.Module):
    """A vision transformer on 13 x 13 patches, assembled from timm's `PatchEmbed` and `Block`.

    From the reference: patches, linear embedding, position embedding, encoder layers, class token, input 1 x 78 x 78
    (after Dosovitskiy et al. 2021). It gives no size. Ours: patches of 6, since a speckle is about two pixels wide; two
    3x3 convolutions with one pooling before the embedding (Xiao et al. 2021), the first at full resolution, because
    some 9,000 cells are too few to learn edges from patches; a head on the class token plus the mean of the patches.
    `stem_widths=()` and `pooling="class token"` give the plain transformer.
    """

    Config = ViTConfig

    def __init__(self, config: ViTConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or ViTConfig()
        size, patch, channels = IMAGE_SIZE, config.patch_size, 1
        self.stem = nn.Sequential()
        if config.stem_widths:
            first, second = config.stem_widths
            self.stem = nn.Sequential(
                normalised_convolution(1, first),
                nn.MaxPool2d(2),
                nn.ReLU(),
                normalised_convolution(first, second),
                nn.ReLU(),
            )
            size, patch, channels = size // 2, patch // 2, second
        self.patches = PatchEmbed(size, patch, channels, config.width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.positions = nn.Parameter(torch.zeros(1, 1 + self.patches.num_patches, config.width))
        trunc_normal_(self.positions, std=0.02)
        rates = [config.stochastic_depth * i / max(1, config.depth - 1) for i in range(config.depth)]
        self.blocks = nn.Sequential(
            *(Block(config.width, config.heads, config.mlp_ratio, qkv_bias=True, drop_path=rate) for rate in rates)
        )
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, CLASSES)

    def extra_repr(self) -> str:
        return f"heads={self.config.heads}, pooling={self.config.pooling!r}"  # of the config, what no layer shows

    def embed(self, images: Tensor) -> Tensor:
        patches = self.patches(self.stem(images))  # (batch, 169, width)
        tokens = torch.cat([self.class_token.expand(len(patches), -1, -1), patches], dim=1)
        return tokens + self.positions

    def forward_features(self, images: Tensor) -> Tensor:
        return self.norm(self.blocks(self.embed(images)))

    def pool(self, tokens: Tensor) -> Tensor:
        pooled = tokens[:, 0]  # (batch, width)
        return pooled + tokens[:, 1:].mean(1) if self.config.pooling == "class token + mean" else pooled

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.pool(self.forward_features(images)))


class StackEnsemble(nn.Module):
    """One linear layer from the calibrated probabilities of CNN and ViT, side by side (batch, 12), to logits.

    From the reference, which says neither what the layer is fitted on nor how its six outputs become probabilities.
    Ours is fitted on cells that neither member was trained on, since members are surer on cells they know. Its outputs
    are taken for probabilities, and their logarithms for logits: it starts as the members' mean, no surer than they.
    """

    members = ("cnn", "vit")

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(len(self.members) * CLASSES, CLASSES)
        nn.init.zeros_(self.linear.bias)
        self.linear.weight.data.copy_(torch.eye(CLASSES).repeat(1, len(self.members)) / len(self.members))

    def forward(self, probabilities: Tensor) -> Tensor:
        # Rounded to half precision, probabilities near 1 would be equal.
        with torch.autocast(probabilities.device.type, enabled=False):
            return self.linear(probabilities.float()).clamp(min=SMALLEST).log()


MODELS = {"cnn": CNN, "rescnn": ResCNN, "vit": ViT, "ensemble": StackEnsemble}
BASE_MODELS = ("cnn", "rescnn", "vit")


class Rejection(nn.Module):
    """Score how much an image is like a cell of the six patterns, from pooled features (batch, features): (batch,).

    A linear layer on standardised features. An image that scores below `threshold` is rejected. Learning from
    negatives is outlier exposure (Hendrycks et al. 2019).
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, 1)
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("spread", torch.ones(features))
        self.register_buffer("threshold", torch.tensor(torch.finfo(torch.float32).min))  # rejects nothing

    def standardised(self, features: Tensor) -> Tensor:
        # A photograph drives some features far off: one of them alone shall not decide.
        return ((features - self.mean) / self.spread).clamp(-8, 8)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(self.standardised(features))[:, 0]


class Answers(NamedTuple):
    """What the classifier says of some images.

    `probabilities`: calibrated, float32 of shape (batch, 4, 6), the models in the order of `MODELS`; `rejection`:
    scores, float32 of shape (batch,); `rejected`: bool of shape (batch,).
    """

    probabilities: Tensor
    rejection: Tensor
    rejected: Tensor


class Classifier(nn.Module):
    """The four models, their temperatures and the rejection: images in, answers out, each model run once."""

    def __init__(self, cnn: CNN, rescnn: ResCNN, vit: ViT) -> None:
        super().__init__()
        self.cnn, self.rescnn, self.vit = cnn, rescnn, vit
        self.ensemble = StackEnsemble()
        self.register_buffer("temperatures", torch.ones(len(MODELS)))
        self.rejection = Rejection(sum(model.head.in_features for model in (cnn, rescnn, vit)))

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Return what CNN, ResCNN and ViT have seen in the images before their heads: (batch, width) each."""
        models = {name: getattr(self, name) for name in BASE_MODELS}
        return {name: model.pool(model.forward_features(images)) for name, model in models.items()}

    def answers(self, features: dict[str, Tensor]) -> Answers:
        """Turn what the models have seen into calibrated probabilities and the rejection's scores."""
        logits = {name: getattr(self, name).head(seen).float() for name, seen in features.items()}
        shares = {
            name: torch.softmax(values / temperature, dim=1)
            for (name, values), temperature in zip(logits.items(), self.temperatures, strict=False)
        }
        stacked = self.ensemble(torch.cat([shares[name] for name in StackEnsemble.members], dim=1))
        shares["ensemble"] = torch.softmax(stacked / self.temperatures[-1], dim=1)
        scores = self.rejection(torch.cat(list(features.values()), dim=1).float())
        probabilities = torch.stack([shares[name] for name in MODELS], dim=1)
        return Answers(probabilities, scores, scores < self.rejection.threshold)

    def forward(self, images: Tensor) -> Answers:
        return self.answers(self.features(images))


def build_model(name: str, architecture: dict | None = None) -> nn.Module:
    """Build an untrained model from the fields of its config; absent fields take their defaults.

    Raises
    ------
    ValueError
        If the name or a field is unknown, or a value does not fit.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: choose one of {list(MODELS)}")
    model, architecture = MODELS[name], architecture or {}
    known = {field.name for field in fields(model.Config)} if hasattr(model, "Config") else set()
    if unknown := set(architecture) - known:
        raise ValueError(
            f"{name}: unknown fields {sorted(unknown)} in the architecture; expected some of {sorted(known)}"
        )
    return model(model.Config(**architecture)) if known else model()
