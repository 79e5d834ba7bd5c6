/* Formats that are not multiplied as they lie: blocks of a panel, one after the other, become what formats.h says that
 * a format expands to, group after group, which is as exact as the block. A leaf a format; above it what a block of it
 * holds, line by line. Column c owns bytes 4c .. 4c + 3 of a line of u; lines of scales have column after column. */

/* FC_PANEL float16 values as a line of float32 */
FC_INLINE void expand_halves(char *out, const char *halves) {
    const uint16_t *from = (const uint16_t *)(const void *)halves;
    for (int j = 0; j < FC_PANEL; j += FC_N) vf_store(out + j * 4, vf_from_f16(from + j));
}

/* 64 k: 16 lines of u = q + 128, 4 k each | FC_PANEL float16 scales of the first 32 k, and of the others */
static void expand_q8_0(char *out, const char *block, ptrdiff_t blocks) {
    for (; blocks > 0; blocks--, block += 17 * FC_LINE)
        for (int group = 0; group < 2; group++, out += 9 * FC_LINE) {
            memcpy(out, block + group * 8 * FC_LINE, 8 * FC_LINE);
            expand_halves(out + 8 * FC_LINE, block + 16 * FC_LINE + group * 32);
        }
}
