"""Opening the files of checkpoints: torch's pickles, old and new, TorchScript archives, safetensors, and their folders.

Written by hand so that nothing in a file can run: `torch.load` either calls what a pickle names or, with
`weights_only`, refuses the original Lightning checkpoints; `torch.jit.load` loads the code of a TorchScript archive.
"""
