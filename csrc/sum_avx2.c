/* XXH3 for processors with AVX2, which most are; asked for at run time by core.c. */
#include "core.h"

#ifdef YC_AVX2
#pragma GCC target("avx2")
#define XXH_VECTOR 2 /* XXH_AVX2 */
#define XXH_INLINE_ALL
#include <xxhash.h>

uint64_t yc_xxh3_avx2(const void *data, uint64_t length, uint64_t seed)
{
    return XXH3_64bits_withSeed(data, length, seed);
}

void yc_xxh3_avx2_update(void *state, const void *data, uint64_t length)
{
    XXH3_64bits_update(state, data, length);
}
#else
typedef int yc_nothing; /* a file of C has to hold something */
#endif
