"""Networks written for other runtimes, ONNX files or programs of `torch.export`, and editing with them.

    export_model(pbe.load_model("model.ckpt", "cpu", "float32"), "exported", to="onnx")
    model = load_exported("exported")
    pictures = pbe.edit(model, "photo.png", "mask.png", "exemplar.png")

Samplers, guidance, windows and pictures stay this library's; docs/export.md says what the folder holds.
"""

from pbe.export.running import ExportedModel, load_exported
from pbe.export.writing import export_model

__all__ = ["ExportedModel", "export_model", "load_exported"]
