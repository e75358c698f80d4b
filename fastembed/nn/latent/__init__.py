"""LatentAttentionPooling: NV-Embed's pooling by attention to latents, and its relatives.

To read in order: `layer`, what is computed from the parameters; `tokens_as_queries` and `latents_as_queries`, the two
directions of it, each as the parameters say and folded; `folding`, how parameters become the folded weights;
`arithmetic`, when that pays; `nv_embed`, the checkpoint's names; `pooling`, the module that puts them together.
"""

from .pooling import LatentAttentionPooling

__all__ = ["LatentAttentionPooling"]
