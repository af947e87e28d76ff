"""SINDER in JAX: find and repair the singular defects of DINOv2.

The modules are named after the concepts of the paper (arXiv:2407.16826):

    families     which models there are, as data
    vit, layers  DINOv2 as a pure-functional Flax ViT, and its layers
    attention    softmax attention and its gradient, by kind of device
    pos_embed    the position embedding, resampled as PyTorch does it
    kernels      names, places and axes of the trainable kernels
    factor       kernel -> U, σ, V and the trainable ε; ε folded back into kernels
    linalg       singular values of many matrices, one matrix per core
    defects      the linear map of each block and the singular defect directions
    loss         outlier mask along a direction, learning target, neighbor loss
    state        options and state of a repair, its start and its resume
    search       an image's first defect, and the gradients in front of it
    repair       the repair step: search the defect, update ε in the active blocks
    placement    arrays copied to every device, or split over the devices
    delta        what a repair changed: ε and the digest of the model it belongs to
    param_tree   flat names, shapes, checks and digest of the params
    model        a loaded model, wherever it is stored; two models compared
    checkpoint   models and trees of arrays on disk
    planted      a small model with planted defects, for the demo and the tests

Rooms for what the paper does not talk about: `storage` (files), `data` (photographs),
`analysis` (numbers about tokens and weights), `remedies` (what else can be done about a
defect), `evals` (what features are worth downstream), `plots` (figures of these
numbers).

Glossary, used in every signature:

    B images · H, W patch grid (rows, columns) · N = H·W patch tokens · R registers
    T = 1 + R + N tokens · D embedding width · M heads · K head width · F FFN width
    L blocks, counted from 0 · S singular values · E side of the neighbor window

Image sides are called height and width and count pixels. A linear map is the matrix
that multiplies a column; a Flax kernel [in, out] is its transpose. U is the output
side, V the input side. A singular vector has no sign.
"""
