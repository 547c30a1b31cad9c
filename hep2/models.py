"""The four models. Each `forward` takes images (batch, 1, 78, 78), float32 in [0, 1], and returns logits (batch, 6)."""

from dataclasses import dataclass, fields
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, trunc_normal_
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from hep2.inference import max_pool
from hep2.patterns import CLASS_NAMES, IMAGE_SIZE

CLASSES = len(CLASS_NAMES)


def probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Turn logits (batch, classes) into probabilities: the only softmax over classes in the package."""
    return torch.softmax(logits.float() / temperature, dim=-1)


def pooled_features(model: nn.Module, images: Tensor) -> Tensor:
    """Return what a CNN, ResCNN or ViT has seen in images (batch, 1, 78, 78), before its head: (batch, width)."""
    return model.pool(model.forward_features(images))


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

    From the source: a 3x3 convolution with padding 2, then four blocks of two 3x3 convolutions, with ReLU after a
    block's first convolution and norm. The source gives neither widths nor the pooling between blocks. Our choices:
    widths 32-64-128-256 (equal work in every block, 2.4 MB at half precision), 2x2 max pooling before each block,
    and a ReLU after each block, without which the last block's second convolution would melt into the average.
    The padding of 2 makes 78 an 80, which halves to 40, 20, 10 and 5 without a remainder.
    """

    Config = CNNConfig
    skips = False

    def __init__(self, config: CNNConfig | None = None) -> None:
        super().__init__()
        self.config = config or self.Config()
        first, *_, last = self.config.widths
        self.stem = normalised_convolution(1, first, padding=2)
        inputs = (first, *self.config.widths[:-1])
        self.blocks = nn.ModuleList(
            ConvolutionBlock(i, o, skip=self.skips) for i, o in zip(inputs, self.config.widths, strict=True)
        )
        self.head = nn.Linear(last, CLASSES)

    def early_layers(self) -> list[nn.Module]:
        return [self.stem, self.blocks[0]]

    def forward_features(self, images: Tensor) -> Tensor:
        features = self.stem(images)  # (batch, 32, 80, 80)
        for block in self.blocks:
            # Pooling first leaves the ReLU a quarter of the work, and the two commute.
            features = block(F.relu(max_pool(features)))
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
    """Shape of the vision transformer; the source gives no figure but the image size."""

    patch_size: int = 6
    stem_widths: tuple[int, ...] = (24, 48)
    width: int = 128
    depth: int = 4
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

    From the source: patches, linear embedding, position embedding, encoder layers, class token, input 1 x 78 x 78
    (after Dosovitskiy et al. 2021). The source gives no size. Our choices: patches of 6, since a speckle is about two
    pixels wide; two 3x3 convolutions with one pooling before the embedding (Xiao et al. 2021), the first at full
    resolution, because some 9,000 cells are too few to learn edges from patches; width 128, depth 4, and a head that
    reads the class token plus the mean of the patches. `stem_widths=()` and `pooling="class token"` give the plain
    transformer of the source.
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
        for block in self.blocks:
            # On CPUs the fused kernel trains at half the speed of plain matrix products for 170 tokens.
            block.attn.fused_attn = False
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, CLASSES)

    def extra_repr(self) -> str:
        return f"heads={self.config.heads}, pooling={self.config.pooling!r}"  # of the config, what no layer shows

    def forward_features(self, images: Tensor) -> Tensor:
        patches = self.patches(self.stem(images))  # (batch, 169, width)
        tokens = torch.cat([self.class_token.expand(len(patches), -1, -1), patches], dim=1)
        return self.norm(self.blocks(tokens + self.positions))

    def pool(self, tokens: Tensor) -> Tensor:
        pooled = tokens[:, 0]  # (batch, width)
        return pooled + tokens[:, 1:].mean(1) if self.config.pooling == "class token + mean" else pooled

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.pool(self.forward_features(images)))


class SpecimenSupervision(nn.Module):
    """A model in training that must also tell the specimens of a class from each other. Ours.

    In training it returns the log-probability of each specimen (batch, specimens): that of its class, from the
    model's own head, plus that of the specimen within the class, from a head that is thrown away afterwards. The
    cross-entropy of these is the class's plus the specimen's. In evaluation, and in training where `telling_apart` is
    set to False, it returns the model's logits (batch, 6).
    """

    def __init__(self, model: CNN | ViT, class_of_specimen: Tensor) -> None:
        super().__init__()
        self.model = model
        self.telling_apart = True
        self.specimens = nn.Linear(model.head.in_features, len(class_of_specimen))
        self.register_buffer("membership", F.one_hot(class_of_specimen, CLASSES).bool().T)  # (classes, specimens)

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            return self.model(images)
        pooled = pooled_features(self.model, images)
        class_logits, specimen_logits = self.model.head(pooled).float(), self.specimens(pooled).float()
        if not self.telling_apart:
            # Several processes wait for each other's gradients of every parameter: these are zero.
            return class_logits + 0 * specimen_logits.sum(dim=1, keepdim=True)
        of_class = specimen_logits[:, None].masked_fill(~self.membership, -torch.inf).logsumexp(2)  # (batch, classes)
        share = F.log_softmax(class_logits, dim=1) - of_class
        return specimen_logits + share @ self.membership.float()


class FullPrecisionLinear(nn.Linear):
    """A linear layer that mixed precision leaves alone: rounded to half, probabilities near 1 would be equal."""

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.autocast(inputs.device.type, enabled=False):
            return super().forward(inputs.float())


class StackEnsemble(nn.Module):
    """A frozen CNN and a frozen ViT side by side; their 6 + 6 probabilities go through one linear layer to 6 logits.

    From the source, which does not say what the layer is fitted on. Ours is fitted on cells that neither member was
    trained on, since members are surer of themselves on cells they know. `temperatures` are the members' own, so that
    the stack reads the same calibrated probabilities that are shown for them.
    """

    member_names = ("cnn", "vit")

    def __init__(self, cnn: CNN, vit: ViT, temperatures: tuple[float, float] = (1.0, 1.0)) -> None:
        super().__init__()
        self.members = nn.ModuleList([cnn, vit]).requires_grad_(False)
        self.temperatures = temperatures
        self.linear = FullPrecisionLinear(2 * CLASSES, CLASSES)
        # Start from the members' mean, sharp enough to be sure where both are.
        nn.init.zeros_(self.linear.bias)
        self.linear.weight.data.copy_(4 * torch.eye(CLASSES).repeat(1, 2))

    def train(self, mode: bool = True) -> "StackEnsemble":
        super().train(mode)
        self.members.eval()
        return self

    def member_probabilities(self, images: Tensor) -> Tensor:
        """Return the members' probabilities side by side, (batch, 12)."""
        return torch.cat(
            [probabilities(m(images), t) for m, t in zip(self.members, self.temperatures, strict=True)], dim=1
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.member_probabilities(images))


class Refusal(nn.Module):
    """Scores what some models see in an image, their pooled features side by side: (batch, features) to (batch,).

    `members` names the models. A linear layer on standardised features: the sum of one for each member. An image that
    scores below `threshold` is refused. Learning from images that are no cells is outlier exposure (Hendrycks et al.
    2019); that one layer on the features will do is our finding.
    """

    def __init__(self, members: tuple[str, ...], features: int) -> None:
        super().__init__()
        self.members = members
        self.linear = nn.Linear(features, 1)
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("spread", torch.ones(features))
        self.register_buffer("threshold", torch.tensor(torch.finfo(torch.float32).min))  # refuses nothing

    def standardised(self, features: Tensor) -> Tensor:
        # A photograph drives some features far off: one of them alone shall not decide.
        return ((features.float() - self.mean) / self.spread).clamp(-8, 8)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(self.standardised(features))[:, 0]


MODELS = {"cnn": CNN, "rescnn": ResCNN, "vit": ViT, "ensemble": StackEnsemble}


def build_model(name: str, architecture: dict | None = None) -> CNN | ViT:
    """Build an untrained CNN, ResCNN or ViT from the fields of its config; absent fields take their defaults.

    Raises
    ------
    ValueError
        If the name or a field is unknown, or a value does not fit.
    """
    if name not in MODELS or name == "ensemble":
        raise ValueError(f"cannot build a model {name!r}: choose one of {[n for n in MODELS if n != 'ensemble']}")
    model, architecture = MODELS[name], architecture or {}
    known = {field.name for field in fields(model.Config)}
    if unknown := set(architecture) - known:
        raise ValueError(
            f"{name}: unknown fields {sorted(unknown)} in the architecture; expected some of {sorted(known)}"
        )
    return model(model.Config(**architecture))
