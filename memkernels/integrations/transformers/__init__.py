"""A pretrained model of Hugging Face transformers gets a memory, and loses it again without a trace.

    from memkernels.integrations import transformers as mkt
    h = mkt.attach(model, mkt.Streaming(layers=[15], mem_size=64, heads=9))

:func:`attach` hooks the model that it is given, and no class: other models of its kind stay as they are. The memory's
state rides in the model's cache of keys and values, so that ``generate`` with beams, batches and sampling works as
before. New layers end in a projection of zero: attaching changes no bit of the logits until something is trained.
"""

try:
    import transformers as _transformers  # noqa: F401 (tells early that it is missing)
except ImportError as error:
    _sentence = "memkernels.integrations.transformers needs transformers, which is not installed"
    raise ImportError(f"{_sentence} (pip install 'memkernels[transformers]')") from error

from .attachment import Attachment, attach
from .attention import register_attention
from .memory import Memory, Mixture, Read, Step, Vote, Votes
from .memory_attention import MemoryAttention
from .neighbours import Neighbours
from .ngrams import Ngrams
from .place import Place
from .product_keys import ProductKeys
from .saving import load
from .streaming import Streaming
from .token_store import Source, TokenStore
from .trace import Traced
from .windows import next_window, score

__all__ = [
    "Attachment",
    "Memory",
    "MemoryAttention",
    "Mixture",
    "Neighbours",
    "Ngrams",
    "Place",
    "ProductKeys",
    "Read",
    "Source",
    "Step",
    "Streaming",
    "TokenStore",
    "Traced",
    "Vote",
    "Votes",
    "attach",
    "load",
    "next_window",
    "register_attention",
    "score",
]
