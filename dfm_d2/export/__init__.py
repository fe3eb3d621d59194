"""A torch module as one file, TorchScript, ONNX, pt2 or pt2 compiled, and the means to run it."""

# Format: the file's name.
FORMATS = {"torchscript": "model.ts", "onnx": "model.onnx", "pt2": "model.pt2", "aoti": "model.aoti.pt2"}
# Under this name a file carries its metadata, as JSON.
ABOUT = "dfm_d2.json"
