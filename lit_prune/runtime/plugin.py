"""Plug-in of transformers: ``from_pretrained`` opens models with packed layers, or of other widths than configured."""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lit_prune.checkpoint import packed
from lit_prune.models.widths import METHOD, narrow, widths_of
from lit_prune.runtime import packed_model


@register_quantization_config(METHOD)
class WidthsConfig(QuantizationConfigMixin):
    """Shapes ``[o, i]`` of the layers with other widths, by name."""

    def __init__(self, shapes: Any = None, **ignored: Any) -> None:
        """Store the shapes."""
        self.quant_method: Any = METHOD
        self.shapes = shapes


@register_quantizer(METHOD)
class WidthsLoader(HfQuantizer):
    """Narrows the layers before their weights are loaded; nothing is quantised."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        narrow(model, widths_of(model.config))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model.is_quantized = False  # so that it can be trained and cast like any other model
        vars(model).pop("quantization_method", None)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Return that ``save_pretrained`` writes such a model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the model can be trained."""
        return True


@register_quantization_config(packed.METHOD)
class PackedConfig(QuantizationConfigMixin):
    """Layouts of the packed layers, by name, and the heads that are tied to an embedding."""

    def __init__(self, version: Any = None, layers: Any = None, tied: Any = None, **ignored: Any) -> None:
        """Store the entry of a config."""
        self.quant_method: Any = packed.METHOD
        self.version, self.layers, self.tied = version, layers, tied


@register_quantizer(packed.METHOD)
class PackedLoader(HfQuantizer):
    """Replaces layers by packed ones before their parts are loaded, and checks these."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        packed_model.prepare(model)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        packed_model.check_packed(model)
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        packed_model.unpack_model(model, dtype)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Return that ``save_pretrained`` writes such a model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the model can be trained: packed weights cannot."""
        return False
