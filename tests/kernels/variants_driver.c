// Prints what native.c makes of bytes that are the same on every machine: each number's bits.
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

int32_t distnorm_dtypes(void);
int32_t distnorm_run(int32_t, int64_t, char *const *, const int64_t *, const int32_t *, int64_t, int64_t, double, double *);
int32_t distnorm_printed(int32_t, int64_t, char *const *, const int64_t *, const int32_t *, int64_t, int64_t, double *, int64_t *);
int32_t distnorm_summaries(int32_t, int64_t, char *const *, const int64_t *, const int32_t *, int64_t, double *);
int64_t distnorm_checksum(const char *, int64_t, int64_t);
void distnorm_fingerprints(int64_t, char *const *, const int64_t *, const int32_t *, int64_t, int64_t *);
void distnorm_samples(int64_t, char *const *, const int64_t *, const int32_t *, uint64_t, double *);

enum { COUNT = 70001 };
static const int SIZE[] = {4, 8, 2, 2};
static char data[COUNT * 8];

static uint64_t bits(double x) {
    uint64_t b;
    memcpy(&b, &x, sizeof b);
    return b;
}

// Of all magnitudes, with some zeros, denormals, infinities and NaNs in the second round.
static void fill(int dtype, int wild) {
    uint64_t state = 12345 + dtype;
    for (int64_t i = 0; i < COUNT; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        double x = (double)(int64_t)state / 9.3e18;
        if (wild) x *= state % 7 ? 1e4 : 1e-40;
        float single = (float)x;
        uint32_t word;
        memcpy(&word, &single, sizeof word);
        uint16_t half = word >> 16; // as fp16 too: some number
        if (dtype == 3 && !wild) half &= 0xbbff;
        char *at = data + i * SIZE[dtype];
        if (dtype == 0) memcpy(at, &single, 4);
        if (dtype == 1) memcpy(at, &x, 8);
        if (dtype >= 2) memcpy(at, &half, 2);
    }
}

int main(void) {
    printf("dtypes %d\n", distnorm_dtypes());
    for (int32_t wild = 0; wild < 2; wild++)
        for (int32_t dtype = 0; dtype < 4; dtype++) {
            char *spans[] = {data, data + 33 * SIZE[dtype], data + 1000 * SIZE[dtype]};
            int64_t numels[] = {33, 967, COUNT - 1000};
            int32_t dtypes[] = {dtype, dtype, dtype};
            double result, rows[12];
            int64_t prints[3];
            if (!(distnorm_dtypes() >> dtype & 1)) continue;
            fill(dtype, wild);
            for (int32_t op = 0; op < 3; op++) {
                distnorm_run(op, 3, spans, numels, dtypes, COUNT, 2, 0, &result);
                printf("%d %d op %d: %016" PRIx64 "\n", wild, dtype, op, bits(result));
                memset(prints, 0, sizeof prints);
                distnorm_printed(op, 3, spans, numels, dtypes, COUNT, 2, &result, prints);
                printf(" %016" PRIx64, bits(result));
                for (int k = 0; k < 3; k++) printf(" %016" PRIx64, (uint64_t)prints[k]);
                distnorm_summaries(op, 3, spans, numels, dtypes, 1, rows);
                for (int k = 0; k < 12; k++) printf(" %016" PRIx64, bits(rows[k]));
                printf("\n");
            }
            distnorm_samples(3, spans, numels, dtypes, 0x5555, rows);
            for (int k = 0; k < 6; k++) printf(" %016" PRIx64, bits(rows[k]));
            distnorm_run(3, 3, spans, numels, dtypes, COUNT, 1, 0.37, 0);
            distnorm_fingerprints(3, spans, numels, dtypes, 1, prints);
            for (int k = 0; k < 3; k++) printf(" %016" PRIx64, (uint64_t)prints[k]);
            printf(" %016" PRIx64 "\n", (uint64_t)distnorm_checksum(data, SIZE[dtype], COUNT));
        }
    return 0;
}
