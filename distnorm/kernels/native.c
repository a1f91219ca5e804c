// The local statistic and the scaling of CPU memory, in one pass over it. native.py builds and calls it.
//
// Spans of memory count as one sequence of elements. Element i is accumulated in fp64 in lane i % LANES of
// unit i / UNIT, and lanes and units are added up in a fixed order. So the result has the same bits
// however the sequence is cut into spans, wherever these lie, and whatever the number of threads.

//
// A square of fp32 and less is exact in fp64, and nothing else is multiplied and added in one: so, compiled with
// -ffp-contract=off, the bits are the same for every CPU.

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

// A wheel holds this file several times in one library, for CPUs of several kinds (hatch_build.py).
#if defined(VARIANT)
#define JOINED(name, variant) name##variant
#define NAMED(name, variant) JOINED(name, variant)
#define distnorm_use_pool NAMED(distnorm_use_pool_, VARIANT)
#define distnorm_dtypes NAMED(distnorm_dtypes_, VARIANT)
#define distnorm_run NAMED(distnorm_run_, VARIANT)
#define distnorm_printed NAMED(distnorm_printed_, VARIANT)
#define distnorm_summaries NAMED(distnorm_summaries_, VARIANT)
#define distnorm_checksum NAMED(distnorm_checksum_, VARIANT)
#define distnorm_fingerprints NAMED(distnorm_fingerprints_, VARIANT)
#define distnorm_samples NAMED(distnorm_samples_, VARIANT)
#endif

#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif

enum { LANES = 32, WIDTH = BYTES / 8, VECTORS = LANES / WIDTH, UNIT = 1 << 16, ROW = 64, MOST_THREADS = 128 };

enum { AHEAD = 4, LINE = 64, MOST_AHEAD = 1024 }; // spans, bytes, bytes: see fetch

// These codes are native.py's too.
enum op { SQUARES, MAGNITUDES, LARGEST, SCALE };
enum dtype { F32, F64, BF16, F16 };

static const int64_t SIZE[] = {4, 8, 2, 2};

#define VECTOR(element, bytes) element __attribute__((vector_size(bytes), aligned(1), may_alias))
typedef VECTOR(double, BYTES) f64;
typedef VECTOR(int64_t, BYTES) i64;
typedef VECTOR(float, BYTES / 2) f32;
typedef VECTOR(uint32_t, BYTES / 2) u32;
#if !defined(__F16C__) && defined(__aarch64__)
typedef VECTOR(__fp16, BYTES / 4) f16;
#endif

#define INLINE static inline __attribute__((always_inline))
#define EACH(k, count) _Pragma("GCC unroll 16") for (int k = 0; k < (count); k++)

// GCC 12 makes two halves and puts them together again of __builtin_convertvector, where one instruction does.
#if defined(__AVX512F__)
INLINE f64 widened(f32 x) { return (f64)_mm512_cvtps_pd((__m256)x); }
#elif defined(__AVX__)
INLINE f64 widened(f32 x) { return (f64)_mm256_cvtps_pd((__m128)x); }
#else
INLINE f64 widened(f32 x) { return __builtin_convertvector(x, f64); }
#endif

#if defined(__F16C__) && BYTES == 64
INLINE f32 load_f16(const char *p) { return (f32)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
INLINE void store_f16(char *p, f32 x) { _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)x, 0)); }
#elif defined(__F16C__)
INLINE f32 load_f16(const char *p) { return (f32)_mm_cvtph_ps(_mm_loadl_epi64((const __m128i *)p)); }
INLINE void store_f16(char *p, f32 x) { _mm_storel_epi64((__m128i *)p, _mm_cvtps_ph((__m128)x, 0)); }
#elif defined(__aarch64__)
INLINE f32 load_f16(const char *p) { return __builtin_convertvector(*(const f16 *)p, f32); }
INLINE void store_f16(char *p, f32 x) { *(f16 *)p = __builtin_convertvector(x, f16); }
#else
#define NO_F16
INLINE f32 load_f16(const char *p) { abort(); }
INLINE void store_f16(char *p, f32 x) { abort(); }
#endif

// bf16 is the upper half of fp32, so a word holds two: which of them comes first doesn't matter.
INLINE f32 upper(u32 words) { return (f32)(words & 0xffff0000u); }
INLINE f32 lower(u32 words) { return (f32)(words << 16); }

// To bf16, to the nearest, ties to even, in the upper half; the lower half is left undefined.
INLINE u32 rounded_bf16(f32 x) {
    u32 bits = (u32)x;
    u32 nan = (u32)(x != x);
    u32 rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    return (nan & 0x7fc00000u) | (~nan & rounded);
}

INLINE void load(enum dtype dtype, const char *p, f64 x[VECTORS]) {
    if (dtype == BF16) {
        EACH(k, VECTORS / 2) {
            u32 words = *(const u32 *)(p + k * BYTES / 2);
            x[k] = widened(lower(words)); // these lanes are the same whatever BYTES is
            x[k + VECTORS / 2] = widened(upper(words));
        }
        return;
    }
    EACH(k, VECTORS) {
        const char *at = p + k * WIDTH * SIZE[dtype];
        x[k] = dtype == F64 ? *(const f64 *)at : widened(dtype == F32 ? *(const f32 *)at : load_f16(at));
    }
}

INLINE f64 accumulated(enum op op, f64 sum, f64 x) {
    if (op == SQUARES) return sum + x * x;
    i64 bits = (i64)x & INT64_MAX;
    if (op == MAGNITUDES) return sum + (f64)bits;
    // Bits of magnitudes are ordered as these are, and NaN comes behind inf.
    i64 most = (i64)sum;
    i64 above = bits > most;
    return (f64)((above & bits) | (~above & most));
}

INLINE void accumulate_steps(enum op op, enum dtype dtype, const char *p, int64_t steps, f64 lanes[VECTORS]) {
    f64 sums[VECTORS];
    EACH(k, VECTORS) sums[k] = lanes[k];
    for (; steps > 0; steps--, p += LANES * SIZE[dtype]) {
        f64 x[VECTORS];
        load(dtype, p, x);
        EACH(k, VECTORS) sums[k] = accumulated(op, sums[k], x[k]);
    }
    EACH(k, VECTORS) lanes[k] = sums[k];
}

INLINE void scale_steps(enum dtype dtype, char *p, int64_t steps, double coef) {
    float factor = (float)coef;
    for (; steps > 0; steps--, p += LANES * SIZE[dtype]) {
        if (dtype == BF16) {
            EACH(k, VECTORS / 2) {
                u32 *at = (u32 *)(p + k * BYTES / 2);
                u32 low = rounded_bf16(lower(*at) * factor), high = rounded_bf16(upper(*at) * factor);
                *at = (high & 0xffff0000u) | (low >> 16);
            }
            continue;
        }
        EACH(k, VECTORS) {
            char *at = p + k * WIDTH * SIZE[dtype];
            if (dtype == F64) *(f64 *)at *= coef;
            if (dtype == F32) *(f32 *)at *= factor;
            if (dtype == F16) store_f16(at, load_f16(at) * factor);
        }
    }
}

// ---- prints: a weighed sum of the words of 32 bits of each span, in the read of the statistic.
//
// Weights are odd, so a word that changes changes the sum, by a product that 64 bits hold; words that trade
// places have other weights. Sums don't depend on how a span is cut, or on who reads which part of it.

enum { WORD = 4, CHUNK = BYTES / WORD };

#define WEIGHT_STEP 0x9E3779B2u
#define WEIGHT(word) ((uint32_t)(word) * WEIGHT_STEP + 0x85EBCA6Bu)

typedef VECTOR(uint64_t, BYTES) u64v;

struct print {
    u64v sum, even, odd; // weights of the next chunk's words, each in the lower half of 64 bits
};

// Of the lower halves.
INLINE u64v product(u64v a, u64v b) {
#if defined(__AVX512F__)
    return (u64v)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (u64v)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__) && BYTES == 16
    return (u64v)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
    return (a & UINT32_MAX) * (b & UINT32_MAX);
#endif
}

INLINE struct print print_from(int64_t word) {
    struct print to = {};
    for (int i = 0; i < CHUNK / 2; i++) {
        to.even[i] = WEIGHT(word + 2 * i);
        to.odd[i] = WEIGHT(word + 2 * i + 1);
    }
    return to;
}

INLINE void print_chunk(struct print *to, const char *p) {
    u64v words = *(const u64v *)p;
    to->sum += product(words, to->even) + product(words >> 32, to->odd);
    to->even += (uint64_t)CHUNK * WEIGHT_STEP; // what it carries into the upper half doesn't count
    to->odd += (uint64_t)CHUNK * WEIGHT_STEP;
}

INLINE uint64_t print_total(const struct print *of) {
    uint64_t total = 0;
    for (int i = 0; i < CHUNK / 2; i++) total += of->sum[i];
    return total;
}

// The part of a span's sum that `bytes` bytes give, which are `offset` bytes from its start.
static uint64_t words_of(const char *p, int64_t bytes, int64_t offset) {
    uint64_t total = 0;
    int64_t word = offset / WORD, into = offset % WORD;
    if (into) {
        uint32_t part = 0;
        int64_t count = bytes < WORD - into ? bytes : WORD - into;
        memcpy((char *)&part + into, p, count);
        total += (uint64_t)part * WEIGHT(word++);
        p += count;
        bytes -= count;
    }
    struct print to = print_from(word);
    for (; bytes >= BYTES; p += BYTES, bytes -= BYTES, word += CHUNK) print_chunk(&to, p);
    for (; bytes > 0; p += WORD, bytes -= WORD) {
        uint32_t part = 0;
        memcpy(&part, p, bytes < WORD ? bytes : WORD);
        total += (uint64_t)part * WEIGHT(word++);
    }
    return total + print_total(&to);
}

INLINE void print_step(struct print *to, enum dtype dtype, const char *p) {
    EACH(k, LANES * WORD / BYTES) {
        if (dtype == F32 || dtype == F64 || k < LANES * 2 / BYTES) print_chunk(to, p + k * BYTES);
    }
    if (dtype == F64) EACH(k, LANES * WORD / BYTES) print_chunk(to, p + LANES * WORD + k * BYTES);
}

INLINE uint64_t print_steps(enum op op, enum dtype dtype, const char *p, int64_t steps, f64 lanes[VECTORS],
                            int64_t word) {
    f64 sums[VECTORS];
    EACH(k, VECTORS) sums[k] = lanes[k];
    struct print to = print_from(word);
    for (; steps > 0; steps--, p += LANES * SIZE[dtype]) {
        f64 x[VECTORS];
        load(dtype, p, x);
        EACH(k, VECTORS) sums[k] = accumulated(op, sums[k], x[k]);
        print_step(&to, dtype, p);
    }
    EACH(k, VECTORS) lanes[k] = sums[k];
    return print_total(&to);
}

// Inlined with a constant op and dtype, so that the lanes stay in registers from span to span.
INLINE void run_steps(enum op op, enum dtype dtype, char *p, int64_t steps, f64 *lanes, double coef) {
    if (op == SCALE) scale_steps(dtype, p, steps, coef);
    else accumulate_steps(op, dtype, p, steps, lanes);
}

// Fewer elements than a step has, of which the first is for this lane: the step's others are zeros.
INLINE void run_part(enum op op, enum dtype dtype, char *p, int64_t count, int64_t lane, f64 *lanes,
                     double coef) {
    char step[LANES * sizeof(double)] = {0};
    int64_t size = SIZE[dtype];
    memcpy(step + lane * size, p, count * size);
    run_steps(op, dtype, step, 1, lanes, coef);
    if (op == SCALE) memcpy(p, step + lane * size, count * size);
}

INLINE void run_dtype(enum op op, enum dtype dtype, char *p, int64_t count, int64_t lane, f64 *lanes,
                      double coef) {
    if (lane) {
        int64_t head = count < LANES - lane ? count : LANES - lane;
        run_part(op, dtype, p, head, lane, lanes, coef);
        p += head * SIZE[dtype];
        count -= head;
    }
    int64_t steps = count / LANES, tail = count % LANES;
    run_steps(op, dtype, p, steps, lanes, coef);
    if (tail) run_part(op, dtype, p + steps * LANES * SIZE[dtype], tail, 0, lanes, coef);
}

INLINE void run(enum op op, enum dtype dtype, char *p, int64_t count, int64_t lane, f64 *lanes, double coef) {
    switch (dtype) {
        case F32: run_dtype(op, F32, p, count, lane, lanes, coef); break;
        case F64: run_dtype(op, F64, p, count, lane, lanes, coef); break;
        case BF16: run_dtype(op, BF16, p, count, lane, lanes, coef); break;
        case F16: run_dtype(op, F16, p, count, lane, lanes, coef); break;
    }
}

INLINE double folded(enum op op, const f64 lanes[VECTORS]) {
    double x[LANES];
    memcpy(x, lanes, sizeof x);
    for (int half = LANES / 2; half; half /= 2)
        for (int k = 0; k < half; k++) {
            // No number in x is negative, so what is not below is above, or NaN.
            if (op == LARGEST) x[k] = x[k] != x[k] || x[k] >= x[k + half] ? x[k] : x[k + half];
            else x[k] += x[k + half];
        }
    return x[0];
}

// As run_dtype; returns the part of the span's print, in which these elements are `offset` bytes from its start.
INLINE uint64_t print_dtype(enum op op, enum dtype dtype, char *p, int64_t count, int64_t lane, f64 *lanes,
                            int64_t offset) {
    int64_t head = !lane ? 0 : count < LANES - lane ? count : LANES - lane, size = SIZE[dtype];
    if (head) run_part(op, dtype, p, head, lane, lanes, 0);
    uint64_t print = head ? words_of(p, head * size, offset) : 0;
    p += head * size;
    offset += head * size;
    int64_t steps = (count - head) / LANES, tail = (count - head) % LANES, bytes = steps * LANES * size;
    if (offset % WORD) { // half words first: what was read is in a cache still
        run_steps(op, dtype, p, steps, lanes, 0);
        print += words_of(p, bytes, offset);
    } else if (steps) {
        print += print_steps(op, dtype, p, steps, lanes, offset / WORD);
    }
    if (tail) {
        run_part(op, dtype, p + bytes, tail, 0, lanes, 0);
        print += words_of(p + bytes, tail * size, offset + bytes);
    }
    return print;
}

INLINE uint64_t print(enum op op, enum dtype dtype, char *p, int64_t count, int64_t lane, f64 *lanes,
                      int64_t offset) {
    switch (dtype) {
        case F32: return print_dtype(op, F32, p, count, lane, lanes, offset);
        case F64: return print_dtype(op, F64, p, count, lane, lanes, offset);
        case BF16: return print_dtype(op, BF16, p, count, lane, lanes, offset);
        case F16: return print_dtype(op, F16, p, count, lane, lanes, offset);
    }
    return 0;
}

struct job {
    enum op op;
    char *const *pointers;
    const int64_t *numels;
    const int32_t *dtypes;
    int64_t spans, total, units;
    double coef;
    double *results; // one for each unit
    int64_t row; // units that a thread takes at a time: the hardware fetches ahead within them
    _Atomic int64_t next;
    _Atomic uint64_t *prints; // one for each span; null for none
};

// The hardware fetches ahead within a span, but not from one small span to the next.
INLINE void fetch(const struct job *job, int64_t span) {
    if (span >= job->spans) return;
    int64_t size = job->numels[span] * SIZE[job->dtypes[span]];
    for (int64_t at = 0; at < size && at < MOST_AHEAD; at += LINE)
        __builtin_prefetch(job->pointers[span] + at);
}

INLINE void work_on(enum op op, struct job *job, int prints) {
    int64_t span = 0, start = 0, unit = 0, last = 0; // units come in rising order, so spans do too
    for (;; unit++) {
        if (unit == last) {
            unit = atomic_fetch_add(&job->next, job->row);
            last = unit + job->row;
        }
        if (unit >= job->units) break;
        int64_t at = unit * UNIT, stop = job->total - at > UNIT ? at + UNIT : job->total;
        f64 lanes[VECTORS] = {0};
        while (at < stop) {
            while (start + job->numels[span] <= at) start += job->numels[span++];
            int64_t end = start + job->numels[span], count = (end < stop ? end : stop) - at;
            enum dtype dtype = (enum dtype)job->dtypes[span];
            char *p = job->pointers[span] + (at - start) * SIZE[dtype];
            fetch(job, span + AHEAD);
            if (prints) {
                uint64_t part = print(op, dtype, p, count, at % LANES, lanes, (at - start) * SIZE[dtype]);
                atomic_fetch_add_explicit(&job->prints[span], part, memory_order_relaxed);
            } else {
                run(op, dtype, p, count, at % LANES, lanes, job->coef);
            }
            at += count;
        }
        if (op != SCALE) job->results[unit] = folded(op, lanes);
    }
}

static void *work(void *job) {
    switch (((struct job *)job)->op) {
        case SQUARES: work_on(SQUARES, job, 0); break;
        case MAGNITUDES: work_on(MAGNITUDES, job, 0); break;
        case LARGEST: work_on(LARGEST, job, 0); break;
        case SCALE: work_on(SCALE, job, 0); break;
    }
    return NULL;
}

static void *work_and_print(void *job) {
    switch (((struct job *)job)->op) {
        case MAGNITUDES: work_on(MAGNITUDES, job, 1); break;
        case LARGEST: work_on(LARGEST, job, 1); break;
        default: work_on(SQUARES, job, 1); break;
    }
    return NULL;
}

struct call {
    struct job *job;
    void *(*work)(void *);
};

static void make(void *call) { ((struct call *)call)->work(((struct call *)call)->job); }

// OpenMP's GOMP_parallel, and the process in which it works: a forked child has none of its threads.
static void (*pool)(void (*)(void *), void *, unsigned, unsigned);
static pid_t owner;

// Use the threads that torch has, which after an operator of torch's spin for a while where others would run.
void distnorm_use_pool(void *parallel) {
    pool = (void (*)(void (*)(void *), void *, unsigned, unsigned))parallel;
    owner = getpid();
}

// Threads of our own live for one call: nothing is left that a fork could break. Where one can't start, the
// others do its work.
static void run_job(struct job *job, int64_t threads, void *(*work)(void *)) {
    if (pool && threads > 1 && getpid() == owner) {
        struct call call = {job, work};
        pool(make, &call, (unsigned)threads, 0);
        return;
    }
    pthread_t others[MOST_THREADS];
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    int started = 0;
    while (started < threads - 1 && !pthread_create(&others[started], NULL, work, job)) started++;
    work(job);
    while (started) pthread_join(others[--started], NULL);
}

// The dtypes that this build can do, as a bit for each code.
int32_t distnorm_dtypes(void) {
#if defined(NO_F16)
    return 1 << F32 | 1 << F64 | 1 << BF16;
#else
    return 1 << F32 | 1 << F64 | 1 << BF16 | 1 << F16;
#endif
}

static int32_t run_all(struct job job, int64_t threads, void *(*work)(void *), double *result) {
    enum op op = job.op;
    int64_t even = job.units / (2 * threads); // so that no thread is left with more than the others
    job.row = even < 1 ? 1 : even < ROW ? even : ROW;
    if (op != SCALE && !(job.results = malloc((job.units + 1) * sizeof(double)))) return 1;
    run_job(&job, threads, work);
    if (op != SCALE) {
        f64 lanes[VECTORS] = {0};
        run(op == LARGEST ? LARGEST : MAGNITUDES, F64, (char *)job.results, job.units, 0, lanes, 0);
        *result = folded(op, lanes);
        free(job.results);
    }
    return 0;
}

// The statistic of spans that have `total` elements, into *result; or the scaling, in place, without a
// result. No span is empty. Returns 0, or 1 if there is no memory.
int32_t distnorm_run(int32_t op, int64_t spans, char *const *pointers, const int64_t *numels,
                     const int32_t *dtypes, int64_t total, int64_t threads, double coef, double *result) {
    struct job job = {op, pointers, numels, dtypes, spans, total, (total + UNIT - 1) / UNIT, coef, NULL, 1, 0};
    return run_all(job, threads, work, result);
}

// The statistic, and to each of `prints` the print of a span, which may be empty, is added.
int32_t distnorm_printed(int32_t op, int64_t spans, char *const *pointers, const int64_t *numels,
                         const int32_t *dtypes, int64_t total, int64_t threads, double *result,
                         int64_t *prints) {
    struct job job = {op, pointers, numels, dtypes, spans, total, (total + UNIT - 1) / UNIT, 0, NULL, 1, 0,
                      (_Atomic uint64_t *)prints};
    return run_all(job, threads, work_and_print, result);
}

// ---- summaries: several statistics of each span by itself, in one pass. A unit is no longer than a span here.

enum { SUMS, MOST, ZEROS, BAD, FIELDS, FOLDED = 2, SUMMED = 8 / WIDTH }; // so sums have 8 lanes on every CPU

static const int64_t INFINITE = 0x7ff0000000000000; // the bits of inf; those of NaN are above

struct summary {
    f64 sums[SUMMED], most[FOLDED];
    i64 zeros[FOLDED], bad[FOLDED];
};

INLINE void summarise_steps(enum op op, enum dtype dtype, const char *p, int64_t steps, struct summary *to) {
    struct summary s = *to;
    for (; steps > 0; steps--, p += LANES * SIZE[dtype]) {
        f64 x[VECTORS];
        load(dtype, p, x);
        EACH(k, VECTORS) {
            i64 bits = (i64)x[k] & INT64_MAX;
            s.sums[k % SUMMED] = accumulated(op, s.sums[k % SUMMED], x[k]);
            s.most[k % FOLDED] = accumulated(LARGEST, s.most[k % FOLDED], x[k]);
            s.zeros[k % FOLDED] -= bits == 0; // true is -1
            s.bad[k % FOLDED] -= bits >= INFINITE;
        }
    }
    *to = s;
}

INLINE void summarise_unit(enum op op, enum dtype dtype, const char *p, int64_t count, double *fields,
                           int64_t stride) {
    struct summary s = {};
    int64_t steps = count / LANES, tail = count % LANES, size = SIZE[dtype];
    summarise_steps(op, dtype, p, steps, &s);
    if (tail) {
        char step[LANES * sizeof(double)] = {0};
        memcpy(step, p + steps * LANES * size, tail * size);
        summarise_steps(op, dtype, step, 1, &s);
    }
    f64 sums[VECTORS] = {}, most[VECTORS] = {};
    int64_t zeros = tail ? tail - LANES : 0, bad = 0; // what fills a step up is no element
    EACH(k, SUMMED) sums[k] = s.sums[k];
    EACH(k, FOLDED) {
        most[k] = s.most[k];
        for (int i = 0; i < WIDTH; i++) {
            zeros += s.zeros[k][i];
            bad += s.bad[k][i];
        }
    }
    fields[SUMS * stride] = folded(op, sums);
    fields[MOST * stride] = folded(LARGEST, most);
    fields[ZEROS * stride] = zeros;
    fields[BAD * stride] = bad;
}

INLINE int64_t units_of(const struct job *job, int64_t span) { return (job->numels[span] + UNIT - 1) / UNIT; }

INLINE void summarise_on(enum op op, struct job *job) {
    int64_t span = 0, first = 0, unit;
    while ((unit = atomic_fetch_add(&job->next, 1)) < job->units) {
        while (first + units_of(job, span) <= unit) first += units_of(job, span++);
        int64_t at = (unit - first) * UNIT, left = job->numels[span] - at, count = left < UNIT ? left : UNIT;
        enum dtype dtype = (enum dtype)job->dtypes[span];
        const char *p = job->pointers[span] + at * SIZE[dtype];
        switch (dtype) {
            case F32: summarise_unit(op, F32, p, count, job->results + unit, job->units); break;
            case F64: summarise_unit(op, F64, p, count, job->results + unit, job->units); break;
            case BF16: summarise_unit(op, BF16, p, count, job->results + unit, job->units); break;
            case F16: summarise_unit(op, F16, p, count, job->results + unit, job->units); break;
        }
    }
}

static void *summarise(void *job) {
    switch (((struct job *)job)->op) {
        case MAGNITUDES: summarise_on(MAGNITUDES, job); break;
        case LARGEST: summarise_on(LARGEST, job); break;
        default: summarise_on(SQUARES, job); break;
    }
    return NULL;
}

// Of each span, into a row of FIELDS: the statistic, the largest magnitude, the number of zeros, and of
// elements that are inf or NaN. Spans may be empty. Returns 0, or 1 if there is no memory.
int32_t distnorm_summaries(int32_t op, int64_t spans, char *const *pointers, const int64_t *numels,
                           const int32_t *dtypes, int64_t threads, double *rows) {
    struct job job = {op, pointers, numels, dtypes, spans, 0, 0, 0, NULL, 1, 0};
    for (int64_t span = 0; span < spans; span++) job.units += units_of(&job, span);
    if (!(job.results = malloc((FIELDS * job.units + 1) * sizeof(double)))) return 1;
    run_job(&job, threads, summarise);
    int64_t first = 0;
    for (int64_t span = 0; span < spans; first += units_of(&job, span++))
        for (int64_t field = 0; field < FIELDS; field++) {
            const double *of_units = job.results + field * job.units + first;
            int64_t units = units_of(&job, span);
            f64 lanes[VECTORS] = {};
            enum op how = field == MOST || (field == SUMS && op == LARGEST) ? LARGEST : MAGNITUDES;
            if (units > 1) run(how, F64, (char *)of_units, units, 0, lanes, 0);
            rows[span * FIELDS + field] = units > 1 ? folded(how, lanes) : units ? *of_units : 0;
        }
    free(job.results);
    return 0;
}

// ---- the checksum of eager.py, of elements of 2, 4 or 8 bytes

enum { CHECKED = 1 << 18 }; // elements of a block, as in eager.py on the CPU

#define WEIGHTED(type) \
    for (int64_t i = 0; i < count; i++) sum += (uint64_t)(int64_t)((const type *)p)[i] * (uint64_t)(2 * i + 1)

static uint64_t weighted(const char *p, int64_t size, int64_t count) {
    uint64_t sum = 0;
    if (size == 2) WEIGHTED(int16_t);
    else if (size == 4) WEIGHTED(int32_t);
    else WEIGHTED(int64_t);
    return sum;
}

int64_t distnorm_checksum(const char *p, int64_t size, int64_t count) {
    uint64_t total = 0;
    for (; count > 0; p += CHECKED * size, count -= CHECKED)
        total = total * 0x5DEECE66D + weighted(p, size, count < CHECKED ? count : CHECKED);
    return (int64_t)total;
}

// ---- fingerprints: proof that bytes are still those that were read

enum { CHAINS = 4, LARGE = 1 << 24, PERIOD = 1 << 10, END = 1 << 12, FETCHED = 8 }; // lines; bytes; periods

typedef VECTOR(uint64_t, LINE) u64s;

// One to one in each argument, so a word that changes changes all that is stirred in behind it; and no two
// words can trade places unseen, as they could in a sum.
#define ROTATED(x) ((x) << 31 | (x) >> 33)
#define STIRRED(hash, word) ROTATED(((hash) ^ (word)) * 0x9E3779B97F4A7C15u)

// Chains are independent, so that a multiplication needn't wait for the one before.
INLINE void stir_lines(u64s hash[CHAINS], const char *p, int64_t lines) {
    u64s h[CHAINS];
    EACH(k, CHAINS) h[k] = hash[k];
    for (; lines >= CHAINS; p += CHAINS * LINE, lines -= CHAINS)
        EACH(k, CHAINS) h[k] = STIRRED(h[k], *(const u64s *)(p + k * LINE));
    for (int k = 0; k < lines; k++) h[k] = STIRRED(h[k], *(const u64s *)(p + k * LINE));
    EACH(k, CHAINS) hash[k] = h[k];
}

// Pseudo-random, so that a column of a matrix, whose rows may be as long as some periods, is met as surely as a row.
INLINE int64_t line_of(uint32_t period) {
    uint32_t mixed = period * 0x9E3779B1u;
    mixed = (mixed ^ mixed >> 15) * 0x85EBCA6Bu;
    return (mixed >> 16) % (PERIOD / LINE);
}

// Every byte of up to LARGE; of more, both ends and one line of each period.
static uint64_t fingerprint(const char *p, int64_t bytes) {
    u64s hash[CHAINS] = {0};
    int64_t inner = bytes > LARGE ? bytes - 2 * END : 0, end = bytes > LARGE ? END : bytes;
    stir_lines(hash, p, end / LINE);
    if (end % LINE) {
        char line[LINE] = {0};
        memcpy(line, p + end / LINE * LINE, end % LINE);
        stir_lines(hash, line, 1);
    }
    for (int64_t i = 0; i < inner / PERIOD; i++) {
        const char *line = p + END + i * PERIOD + line_of(i) * LINE;
        __builtin_prefetch(p + END + (i + FETCHED) * PERIOD + line_of(i + FETCHED) * LINE);
        hash[i % CHAINS] = STIRRED(hash[i % CHAINS], *(const u64s *)line);
    }
    if (inner) stir_lines(hash, p + bytes - END, END / LINE);
    uint64_t total = bytes;
    for (int k = 0; k < CHAINS; k++)
        for (int i = 0; i < LINE / 8; i++) total = STIRRED(total, hash[k][i]);
    return total;
}

static void *fingerprint_spans(void *argument) {
    struct job *job = argument;
    int64_t first;
    while ((first = atomic_fetch_add(&job->next, job->row)) < job->spans)
        for (int64_t span = first; span < first + job->row && span < job->spans; span++) {
            uint64_t found = fingerprint(job->pointers[span], job->numels[span] * SIZE[job->dtypes[span]]);
            fetch(job, span + AHEAD);
            memcpy(&job->results[span], &found, sizeof found);
        }
    return NULL;
}

// The fingerprint of each span, which may be empty, as 64 bits into a row of `prints`.
void distnorm_fingerprints(int64_t spans, char *const *pointers, const int64_t *numels, const int32_t *dtypes,
                           int64_t threads, int64_t *prints) {
    struct job job = {SQUARES, pointers, numels, dtypes, spans, 0, 0, 0, (double *)prints, 4, 0};
    run_job(&job, threads, fingerprint_spans);
}

// ---- samples: a few elements of each span, the same ones as sampling.py takes

enum { RUNS = 4, RUN = 16, SAMPLE = RUNS * RUN };

INLINE void widen_run(enum dtype dtype, const char *p, int64_t count, double *x) {
    char held[RUN * sizeof(double)] = {0};
    memcpy(held, p, count * SIZE[dtype]);
    if (dtype == F16) {
        EACH(k, RUN / WIDTH) {
            f32 few = load_f16(held + k * WIDTH * SIZE[F16]);
            for (int i = 0; i < WIDTH; i++) x[k * WIDTH + i] = few[i];
        }
        return;
    }
    for (int64_t i = 0; i < RUN; i++) {
        uint16_t half;
        uint32_t word;
        float single;
        memcpy(&half, held + i * sizeof half, sizeof half);
        word = (uint32_t)half << 16;
        memcpy(&single, dtype == BF16 ? (const char *)&word : held + i * sizeof single, sizeof single);
        x[i] = single;
        if (dtype == F64) memcpy(&x[i], held + i * sizeof(double), sizeof(double));
    }
}

INLINE double added(double x[SAMPLE]) {
    for (int half = SAMPLE / 2; half; half /= 2)
        for (int k = 0; k < half; k++) x[k] += x[k + half];
    return x[0];
}

// Of each span, which may be empty, two sums into a row: with the signs of `signs`, a bit for each place in
// the sample (1 is minus), and of magnitudes.
void distnorm_samples(int64_t spans, char *const *pointers, const int64_t *numels, const int32_t *dtypes,
                      uint64_t signs, double *rows) {
    for (int64_t span = 0; span < spans; span++) {
        double x[SAMPLE] = {0}, magnitudes[SAMPLE];
        int64_t numel = numels[span];
        enum dtype dtype = (enum dtype)dtypes[span];
        if (span + AHEAD < spans) __builtin_prefetch(pointers[span + AHEAD]);
        for (int64_t run = 0; run < RUNS; run++) {
            int64_t from = numel > SAMPLE ? (run * (numel - RUN)) / (RUNS - 1) : run * RUN;
            int64_t count = numel - from < RUN ? numel - from : RUN;
            if (count > 0) widen_run(dtype, pointers[span] + from * SIZE[dtype], count, x + run * RUN);
        }
        for (int k = 0; k < SAMPLE; k++) {
            magnitudes[k] = x[k] < 0 ? -x[k] : x[k];
            if (signs >> k & 1) x[k] = -x[k];
        }
        rows[2 * span] = added(x);
        rows[2 * span + 1] = added(magnitudes);
    }
}
