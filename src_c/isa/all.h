/* One ISA: the vocabulary, every leaf, and the table that is this file's only symbol.
 * The including file has set FC_ISA, FC_TABLE, FC_BYTES and the target region. An ISA that does better than the common
 * text in some leaf names a file in FC_LEAVES: that holds leaves of its own, which may call the common ones, and
 * FC_REPLACED, their entries in the table, `.leaf = its_leaf,` or `.typed_leaf[FC_F16] = its_leaf,`. */
#include "../simd.h"
#ifdef FC_HAS_TILES
#include "../simd/amx.h"
#endif

#include "../kernels.h"

#include "../kernels/stream.h"
#include "../kernels/activations.h"
#include "../kernels/conv1d.h"
#include "../kernels/convert.h"
#include "../kernels/gemm.h"
#include "../kernels/gemm_integers.h"
#ifdef FC_HAS_TILES
#include "../kernels/tiles.h"
#endif
#include "../kernels/quantize.h"
#include "../kernels/expand.h"
#include "../kernels/blocks.h"
#include "../kernels/attention.h"
#include "../kernels/paged.h"
#include "../kernels/attention_bytes.h"
#ifdef FC_HAS_TILES
#include "../kernels/attention_tiles.h"
#include "../kernels/tiles_pages.h"
#include "../kernels/attention_byte_tiles.h"
#endif
#include "../kernels/residual.h"
#include "../kernels/layer_norm.h"
#include "../kernels/linear.h"
#include "../kernels/panels.h"
#include "../kernels/rms_norm.h"
#include "../kernels/roofline.h"
#include "../kernels/rope.h"
#include "../kernels/route_tokens.h"
#include "../kernels/rg_lru.h"
#include "../kernels/scan.h"
#include "../kernels/search.h"
#include "../kernels/softmax.h"
#include "../kernels/ssd.h"
#include "../kernels/delta.h"
#include "../kernels/s4d.h"

#define FC_DEFINE(name, params, ...)                                                                                   \
    static void name##_f32 params { name##_any(FC_F32, __VA_ARGS__); }                                                 \
    static void name##_f16 params { name##_any(FC_F16, __VA_ARGS__); }                                                 \
    static void name##_bf16 params { name##_any(FC_BF16, __VA_ARGS__); }
FC_TYPED_KERNELS(FC_DEFINE)

#ifdef FC_LEAVES
#include FC_LEAVES
#else
#define FC_REPLACED
#endif

#define FC_TYPED_ENTRY(name, params, ...) .name = {name##_f32, name##_f16, name##_bf16},
#define FC_ENTRY(name, params) .name = name,
#define FC_EXPANSION_ENTRY(name, layout) [layout] = expand_##name,
#define FC_FEW_ENTRY(name, layout) [layout] = few_##name,
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Woverride-init" /* FC_REPLACED comes last, on purpose */
const struct fc_kernels FC_TABLE = {
    .isa = FC_ISA,
    .ops_f32 = FC_OPS_F32,
    .ops_bf16 = FC_OPS_BF16,
    .ops_i8 = FC_OPS_I8,
    .ops_i4 = FC_OPS_I4,
    .bf16_x = FC_BF16_X,
    .bf16_k = FC_BF16_K,
    .i8_x = FC_I8_X,
    .i4_x = FC_I4_X,
    .x_align = FC_X_ALIGN,
    .byte_query = FC_BYTE_QUERY,
    .blocks = FC_BLOCKS,
    .unpacked = FC_UNPACKED,
    .expand = {FC_EXPANSIONS(FC_EXPANSION_ENTRY)},
    .few = {FC_EXPANSIONS(FC_FEW_ENTRY)},
    .staged_heads = FC_STAGED_HEADS,
    FC_TYPED_KERNELS(FC_TYPED_ENTRY) FC_KERNELS(FC_ENTRY) FC_REPLACED};
#pragma GCC diagnostic pop
