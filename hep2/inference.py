"""Trained models made ready to read: the same answers, within rounding, for less work."""

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def ready_to_read(model: nn.Module) -> nn.Module:
    """Prepare a model in evaluation mode, in place, that is not trained any more.

    In each `nn.Sequential` that begins with a convolution and its norm, the convolution takes over the norm, and a ReLU
    if that is the third and last; all convolutions and linear layers become their packed kind, max pooling its quick
    one, and attention its fused one, which is slower in training alone.
    """
    model.eval()
    for sequence in [module for module in model.modules() if isinstance(module, nn.Sequential)]:
        kinds = [type(module) for module in sequence]
        if kinds[:2] == [nn.Conv2d, nn.BatchNorm2d]:
            sequence[0], sequence[1] = fuse_conv_bn_eval(sequence[0], sequence[1]), nn.Identity()
    for module in model.modules():
        if type(module) in _QUICK and (type(module) is not nn.MaxPool2d or _halves(module)):
            module.__class__ = _QUICK[type(module)]
        elif isinstance(module, Attention):
            module.fused_attn = True
    for sequence in [module for module in model.modules() if isinstance(module, nn.Sequential)]:
        if [type(module) for module in sequence] == [PackedConvolution, nn.Identity, nn.ReLU]:
            sequence[0].activation, sequence[2] = "relu", nn.Identity()
    return model.to(memory_format=torch.channels_last)


def _onednn_works() -> bool:
    """Tell whether oneDNN is there, with all that packed layers call, and quick at it."""
    operators = (
        (torch.ops.mkldnn, "_convolution_pointwise"),
        (torch.ops.mkldnn, "_reorder_linear_weight"),
        (torch.ops.mkldnn, "_linear_pointwise"),
        (torch._C._nn, "mkldnn_reorder_conv2d_weight"),
    )
    if not torch.backends.mkldnn.is_available() or not all(hasattr(*operator) for operator in operators):
        return False
    # On 64-bit Arm another library stands behind it, whose fused convolutions are slow.
    on_arm = getattr(torch.ops.mkldnn, "_is_mkldnn_acl_supported", None)
    return on_arm is None or not on_arm()


_ONEDNN_WORKS = _onednn_works()


class _Packed:
    """A layer that on a CPU keeps its weights as oneDNN lays them out, and calls oneDNN itself.

    PyTorch hands small convolutions of one image to a slow kernel, lays out the weights of the others anew in every
    pass, and takes linear layers to a library that some processors run at half their rate. The operators are private
    ones, made for `torch.compile`: where they are missing, and wherever a pass has gradients, is compiled or is on a
    card, the layer is an ordinary one.
    """

    _weights: Tensor | None = None
    _version = -1

    def _packs(self, inputs: Tensor) -> bool:
        return (
            _ONEDNN_WORKS
            and torch.backends.mkldnn.enabled
            and inputs.device.type == "cpu"
            and inputs.dtype == self.weight.dtype == torch.float32
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
        )

    def _packed(self, inputs: Tensor) -> Tensor:
        # Weights that were loaded or changed since are packed anew; those made in inference mode tell of no change.
        version = 0 if self.weight.is_inference() else self.weight._version
        if self._weights is None or self._version != version:
            self._weights, self._version = self._pack(inputs), version
        return self._weights

    def __getstate__(self) -> dict:
        # What is packed can neither be copied nor stored, and is soon packed again.
        return {key: value for key, value in self.__dict__.items() if key not in ("_weights", "_version")}


class PackedConvolution(_Packed, nn.Conv2d):
    """A convolution, and the activation that follows it, "none" or "relu"; see `_Packed`."""

    activation = "none"

    @property
    def _geometry(self) -> tuple:
        return self.padding, self.stride, self.dilation, self.groups

    def _pack(self, images: Tensor) -> Tensor:
        weight = self.weight.detach().contiguous().to_mkldnn()
        return torch._C._nn.mkldnn_reorder_conv2d_weight(weight, *self._geometry, list(images.shape))

    def forward(self, images: Tensor) -> Tensor:
        if not self._packs(images):
            features = super().forward(images)
            return torch.relu(features) if self.activation == "relu" else features
        operands = (images, self._packed(images), self.bias, *self._geometry)
        return torch.ops.mkldnn._convolution_pointwise(*operands, self.activation, [], "")


class PackedLinear(_Packed, nn.Linear):
    """A linear layer; see `_Packed`."""

    def _pack(self, inputs: Tensor) -> Tensor:
        rows = inputs.numel() // inputs.shape[-1]
        return torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), rows)

    def forward(self, inputs: Tensor) -> Tensor:
        if not self._packs(inputs):
            return super().forward(inputs)
        return torch.ops.mkldnn._linear_pointwise(inputs, self._packed(inputs), self.bias, "none", [], "")


def max_pool(features: Tensor) -> Tensor:
    """Pool features (batch, channels, rows, columns) by 2 x 2, rows and columns being even.

    PyTorch's own pooling also notes where each maximum was, which takes longer than finding it.
    """
    if features.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.max_pool2d(features, 2)
    rows = torch.maximum(features[:, :, ::2], features[:, :, 1::2])
    return torch.maximum(rows[..., ::2], rows[..., 1::2])


def _halves(pool: nn.MaxPool2d) -> bool:
    return (pool.kernel_size, pool.stride, pool.padding, pool.dilation) == (2, 2, 0, 1)


class _HalvingMaxPool(nn.MaxPool2d):
    """A max pooling of 2 x 2; see `max_pool`."""

    def forward(self, features: Tensor) -> Tensor:
        return max_pool(features)


_QUICK = {nn.Conv2d: PackedConvolution, nn.Linear: PackedLinear, nn.MaxPool2d: _HalvingMaxPool}
