"""PyTorch files, read and written tensor by tensor.

.safetensors, shards, .pth, Hugging Face directory --reading--> StateDict
specs, (name, tensor), ... --writing--> the same kinds of files
"""
