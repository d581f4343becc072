"""Foreign weights to a folder of safetensors and back: `python -m toolkit.convert FILE --to FOLDER`.

The only place that reads pickles of others, with `weights_only=True`, in a child process under limits.
"""
