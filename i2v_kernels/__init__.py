"""Fused kernels that turn image-language models into video models at the price of images."""
