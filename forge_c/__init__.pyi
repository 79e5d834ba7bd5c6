from forge_c import integrations as integrations
from forge_c import models as models
from forge_c import nn as nn
from forge_c import packing as packing
from forge_c.functional import PackedWeight as PackedWeight
from forge_c.functional import attention as attention
from forge_c.functional import available_isas as available_isas
from forge_c.functional import causal_conv1d as causal_conv1d
from forge_c.functional import embedding as embedding
from forge_c.functional import gated_linear as gated_linear
from forge_c.functional import geglu as geglu
from forge_c.functional import gelu as gelu
from forge_c.functional import get_num_threads as get_num_threads
from forge_c.functional import isa as isa
from forge_c.functional import layer_norm as layer_norm
from forge_c.functional import linear as linear
from forge_c.functional import merge_attention as merge_attention
from forge_c.functional import relu as relu
from forge_c.functional import rms_norm as rms_norm
from forge_c.functional import rope as rope
from forge_c.functional import selective_scan as selective_scan
from forge_c.functional import set_num_threads as set_num_threads
from forge_c.functional import silu as silu
from forge_c.functional import softmax as softmax
from forge_c.functional import swiglu as swiglu
from forge_c.functional import use_isa as use_isa
from forge_c.packing import pack as pack
from forge_c.packing import pack_gated as pack_gated
from forge_c.rotary import RopeTable as RopeTable
from forge_c.rotary import rope_table as rope_table
from forge_c.runtime import roofline as roofline
from forge_c.runtime import show_config as show_config
from forge_c.state.kv import KVCache as KVCache
from forge_c.state.kv import kv_cache_nbytes as kv_cache_nbytes
from forge_c.version import __version__ as __version__

def get_include() -> str: ...
def get_library_dir() -> str: ...
