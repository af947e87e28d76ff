"""SINDER in JAX: find and repair the singular defects of DINOv2.

The modules are named after the concepts of the paper (arXiv:2407.16826):

    vit         DINOv2 as a pure-functional Flax ViT; layers holds its layers,
                pos_embed resamples its grid
    defects     the linear map of each block and the singular defect directions
    loss        outlier mask along a direction, learning target, neighbor loss
    factor      kernel -> U, σ, V and the trainable ε; folding ε back into kernels
    attention   softmax attention and its gradient, by kind of device
    placement   arrays whole on every device, or split over them
    repair      the repair step: search the defect, update ε in the active blocks
    families    which models there are, as data: sizes, patch, image statistics, ...
    data        photographs in a fixed order: listing finds them, decode reads one,
                batches streams them
    analysis    numbers: forecast and spectra of the weights; tokens along a direction;
                defective, which says what a defective token is; pca
    plots       figures of these numbers, by matplotlib
    checkpoint  models on disk, on top of store (arrays with digests); states of a run
    paths       places on a disk and in a bucket
    kernels     names, places and axes of the trainable kernels
    linalg      singular values of many matrices, one matrix per core
    patch       a repair as ε and the digest of the model it belongs to
    planted     a small model with planted defects, for the demo and the tests

Glossary, used in every signature:

    B images · H, W patch grid (rows, columns) · N = H·W patch tokens · R registers
    T = 1 + R + N tokens · D embedding width · M heads · K head width · F FFN width
    L blocks, counted from 0 · S singular values · E side of the neighbor window

Image sides are called height and width and count pixels. A linear map is the matrix
that multiplies a column; a Flax kernel [in, out] is its transpose. U is the output
side, V the input side. A singular vector has no sign.
"""
