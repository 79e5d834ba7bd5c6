/* simd.h's backend words for aarch64 NEON. */
#include <arm_neon.h>

#include "narrow.h"

FC_INLINE void vf_stream(float *p, vf a) { vf_store(p, a); } /* C has no word for stnp */
FC_INLINE void vf_stream_part(void *p, const void *from) { vf_stream(p, vf_load(from)); }
FC_INLINE void vf_stream_end(void) {}
FC_INLINE vf vf_fma(vf a, vf b, vf c) { return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
FC_INLINE vf vf_sqrt(vf a) { return (vf)vsqrtq_f32((float32x4_t)a); }
/* vmaxq would return NaN for either operand; the vocabulary promises b, as on x86. */
FC_INLINE vf vf_max(vf a, vf b) { return vf_if_lt(b, a, a, b); }
FC_INLINE vf vf_min(vf a, vf b) { return vf_if_lt(a, b, a, b); }

FC_INLINE vf vf_from_bf16(const uint16_t *p) { return (vf)vshll_n_u16(vld1_u16(p), 16); }
FC_INLINE void vf_to_bf16(uint16_t *p, vf a) { vst1_u16(p, vmovn_u32((uint32x4_t)vf_bf16_bits(a))); }
FC_INLINE vf vf_from_f16(const uint16_t *p) { return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
FC_INLINE void vf_to_f16(uint16_t *p, vf a) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)a))); }

FC_INLINE vf vf_swap(vf a) { return (vf)vrev64q_f32((float32x4_t)a); }
FC_INLINE vf vf_dup(const float *p) {
    float32x2_t pair = vld1_f32(p);
    return (vf)vcombine_f32(vdup_lane_f32(pair, 0), vdup_lane_f32(pair, 1));
}

FC_INLINE void vf_transpose(vf r[4]) {
    float32x4x2_t a = vtrnq_f32((float32x4_t)r[0], (float32x4_t)r[1]);
    float32x4x2_t b = vtrnq_f32((float32x4_t)r[2], (float32x4_t)r[3]);
    r[0] = (vf)vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0]));
    r[1] = (vf)vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1]));
    r[2] = (vf)vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0]));
    r[3] = (vf)vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1]));
}

FC_INLINE vf vf_add_product(vf acc, vf a, vf b) { return vf_fma(a, b, acc); }
FC_INLINE vi vi_from_s8(const int8_t *p) { return (vi)vmovl_s8(vld1_s8(p)); }
FC_INLINE vi vi_from_u8(const uint8_t *p) {
    uint32_t four;
    memcpy(&four, p, 4);
    return (vi)vmovl_u16(vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four)))));
}
FC_INLINE vu vu_look_up(const uint8_t *table, vu i) { return (vu)vqtbl1q_u8(vld1q_u8(table), (uint8x16_t)i); }
FC_INLINE vi vi_madd16(vi a, vi b) {
    int16x8_t p = (int16x8_t)a, q = (int16x8_t)b;
    int32x4_t low = vmull_s16(vget_low_s16(p), vget_low_s16(q)), high = vmull_high_s16(p, q);
    return (vi)vpaddq_s32(low, high);
}
FC_INLINE vi vi_add_madd16(vi acc, vi a, vi b) { return acc + vi_madd16(a, b); }
FC_INLINE void vi_put16(int16_t *p, vi a) { vst1_s16(p, vmovn_s32((int32x4_t)a)); }
FC_INLINE void vi_put8(int8_t *p, vi a) {
    int16x4_t h = vmovn_s32((int32x4_t)a);
    int8x8_t b = vmovn_s16(vcombine_s16(h, h));
    memcpy(p, &b, 4);
}
