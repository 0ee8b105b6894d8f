// One vector type per element type, for the instruction set this library is compiled for: AVX-512, AVX2 or neither.
//
// A library holds one instruction set; sparse_backend/_build/cpu.py decides which one a machine gets. Arithmetic is
// never fused: element by element it gives, on every machine, what torch's separate multiplications and additions give.
#pragma once

#include <cstdint>
#if defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#endif

namespace sparse_backend {

// While one lives, this thread takes numbers too small for a full mantissa as 0. A state left alone decays through
// them, and each operation on one costs a hundred cycles. Does nothing where there is no SSE.
class NoDenormals {
  public:
    NoDenormals() : before_(mode()) { set_mode(before_ | 0x8040); }
    ~NoDenormals() { set_mode(before_); }
    NoDenormals(const NoDenormals&) = delete;
    NoDenormals& operator=(const NoDenormals&) = delete;

  private:
#if defined(__SSE2__)
    static unsigned mode() { return _mm_getcsr(); }
    static void set_mode(unsigned mode) { _mm_setcsr(mode); }
#else
    static unsigned mode() { return 0; }
    static void set_mode(unsigned) {}
#endif
    unsigned before_;
};

#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

constexpr int kVectorRegisters = 32;

// Beside arithmetic:
// pack(bits, from, to): the entries that bits choose one behind another, and anything behind them, `width` in all;
// pack(bits, first, to): the same of the numbers first, first + 1, ...
template <typename T>
struct Vec;

template <>
struct Vec<float> {
    static constexpr int width = 16;
    using Mask = __mmask16;
    __m512 v;
    static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
    static Vec load(const float* p, int n) { return {_mm512_maskz_loadu_ps(tail(n), p)}; }
    static Vec all(float a) { return {_mm512_set1_ps(a)}; }
    void store(float* p) const { _mm512_storeu_ps(p, v); }
    void store(float* p, int n) const { _mm512_mask_storeu_ps(p, tail(n), v); }
    friend Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
    friend Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
    friend Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
    friend Mask operator>(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
    friend Mask inside(Vec a, Vec b) { return _mm512_cmp_ps_mask(_mm512_abs_ps(a.v), b.v, _CMP_NGE_UQ); }
    friend Mask exceeds(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NLE_UQ); }
    static Vec where(Mask m, Vec a) { return {_mm512_maskz_mov_ps(m, a.v)}; }
    static Vec where(Mask m, Vec a, Vec b) { return {_mm512_mask_blend_ps(m, b.v, a.v)}; }
    Mask nonzero() const { return _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ); }
    float sum() const { return _mm512_reduce_add_ps(v); }
    static uint32_t bits(Mask m) { return m; }
    static Mask either(Mask a, Mask b) { return _kor_mask16(a, b); }
    static Mask without(Mask a, Mask b) { return _kandn_mask16(b, a); }
    static Mask tail(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
    static void pack(uint32_t bits, Vec from, float* to) {
        _mm512_storeu_ps(to, _mm512_maskz_compress_ps(static_cast<Mask>(bits), from.v));
    }
    static void pack(uint32_t bits, int32_t first, int32_t* to) {
        const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i from = _mm512_add_epi32(lanes, _mm512_set1_epi32(first));
        _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(static_cast<Mask>(bits), from));
    }
};

template <>
struct Vec<double> {
    static constexpr int width = 8;
    using Mask = __mmask8;
    __m512d v;
    static Vec load(const double* p) { return {_mm512_loadu_pd(p)}; }
    static Vec load(const double* p, int n) { return {_mm512_maskz_loadu_pd(tail(n), p)}; }
    static Vec all(double a) { return {_mm512_set1_pd(a)}; }
    void store(double* p) const { _mm512_storeu_pd(p, v); }
    void store(double* p, int n) const { _mm512_mask_storeu_pd(p, tail(n), v); }
    friend Vec operator+(Vec a, Vec b) { return {_mm512_add_pd(a.v, b.v)}; }
    friend Vec operator-(Vec a, Vec b) { return {_mm512_sub_pd(a.v, b.v)}; }
    friend Vec operator*(Vec a, Vec b) { return {_mm512_mul_pd(a.v, b.v)}; }
    friend Mask operator>(Vec a, Vec b) { return _mm512_cmp_pd_mask(a.v, b.v, _CMP_GT_OQ); }
    friend Mask inside(Vec a, Vec b) { return _mm512_cmp_pd_mask(_mm512_abs_pd(a.v), b.v, _CMP_NGE_UQ); }
    friend Mask exceeds(Vec a, Vec b) { return _mm512_cmp_pd_mask(a.v, b.v, _CMP_NLE_UQ); }
    static Vec where(Mask m, Vec a) { return {_mm512_maskz_mov_pd(m, a.v)}; }
    static Vec where(Mask m, Vec a, Vec b) { return {_mm512_mask_blend_pd(m, b.v, a.v)}; }
    Mask nonzero() const { return _mm512_cmp_pd_mask(v, _mm512_setzero_pd(), _CMP_NEQ_UQ); }
    double sum() const { return _mm512_reduce_add_pd(v); }
    static uint32_t bits(Mask m) { return m; }
    static Mask either(Mask a, Mask b) { return _kor_mask8(a, b); }
    static Mask without(Mask a, Mask b) { return _kandn_mask8(b, a); }
    static Mask tail(int n) { return static_cast<__mmask8>((1u << n) - 1u); }
    static void pack(uint32_t bits, Vec from, double* to) {
        _mm512_storeu_pd(to, _mm512_maskz_compress_pd(static_cast<Mask>(bits), from.v));
    }
    static void pack(uint32_t bits, int32_t first, int32_t* to) {
        const __m256i from = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(first));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_maskz_compress_epi32(static_cast<Mask>(bits), from));
    }
};

#else  // AVX2, or any machine: the compiler's own vectors, 32 bytes wide

constexpr int kVectorRegisters = 16;

#ifdef __AVX2__
// By a mask of 8 bits: which of 8 lanes of 4 bytes come first.
struct Packings {
    alignas(32) int32_t lanes[256][8] = {};
    constexpr Packings() {
        for (int bits = 0; bits < 256; ++bits)
            for (int lane = 0, n = 0; lane < 8; ++lane)
                if (bits >> lane & 1) lanes[bits][n++] = lane;
    }
};
inline constexpr Packings kPackings;
#endif

template <int>
struct Integer;
template <>
struct Integer<4> {
    using type = int32_t;
};
template <>
struct Integer<8> {
    using type = int64_t;
};

template <typename T>
struct Vec {
    static constexpr int width = 32 / static_cast<int>(sizeof(T));
    typedef T Native __attribute__((vector_size(32)));
    using Int = typename Integer<sizeof(T)>::type;
    typedef Int Mask __attribute__((vector_size(32)));  // all ones where chosen
    Native v;
    static Vec load(const T* p) {
        Vec a;
        __builtin_memcpy(&a.v, p, sizeof(Native));
        return a;
    }
    static Vec load(const T* p, int n) {
        Vec a = all(T(0));
        for (int i = 0; i < n; ++i) a.v[i] = p[i];
        return a;
    }
    static Vec all(T a) { return {a - Native{}}; }
    void store(T* p) const { __builtin_memcpy(p, &v, sizeof(Native)); }
    void store(T* p, int n) const {
        for (int i = 0; i < n; ++i) p[i] = v[i];
    }
    friend Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
    friend Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
    friend Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
    friend Mask operator>(Vec a, Vec b) { return a.v > b.v; }
    friend Mask inside(Vec a, Vec b) { return ~((a.v >= b.v) | (-a.v >= b.v)); }
    friend Mask exceeds(Vec a, Vec b) { return ~(a.v <= b.v); }
    static Vec where(Mask m, Vec a) { return {reinterpret_cast<Native>(reinterpret_cast<Mask>(a.v) & m)}; }
    static Vec where(Mask m, Vec a, Vec b) {
        return {reinterpret_cast<Native>((reinterpret_cast<Mask>(a.v) & m) | (reinterpret_cast<Mask>(b.v) & ~m))};
    }
    Mask nonzero() const { return ~(v == Native{}); }
    T sum() const {
        T total = v[0];
        for (int i = 1; i < width; ++i) total += v[i];
        return total;
    }
    static uint32_t bits(Mask m) {
#ifdef __AVX2__
        if constexpr (sizeof(T) == 4) return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(m)));
        if constexpr (sizeof(T) == 8) return static_cast<uint32_t>(_mm256_movemask_pd(reinterpret_cast<__m256d>(m)));
#endif
        uint32_t out = 0;
        for (int i = 0; i < width; ++i) out |= static_cast<uint32_t>(m[i] & 1) << i;
        return out;
    }
    static Mask either(Mask a, Mask b) { return a | b; }
    static Mask without(Mask a, Mask b) { return a & ~b; }
#ifdef __AVX2__
    static void pack(uint32_t bits, Vec from, T* to) {
        if constexpr (sizeof(T) == 8) {  // a lane is two of 4 bytes
            bits = (bits | bits << 2) & 0x33;
            bits = ((bits | bits << 1) & 0x55) * 3;
        }
        const __m256i lanes = _mm256_load_si256(reinterpret_cast<const __m256i*>(kPackings.lanes[bits]));
        const __m256i packed = _mm256_permutevar8x32_epi32(reinterpret_cast<__m256i>(from.v), lanes);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), packed);
    }
    static void pack(uint32_t bits, int32_t first, int32_t* to) {
        const auto* lanes = reinterpret_cast<const __m128i*>(kPackings.lanes[bits]);
        for (int i = 0; i < width / 4; ++i)
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to) + i,
                             _mm_add_epi32(_mm_load_si128(lanes + i), _mm_set1_epi32(first)));
    }
#else
    static void pack(uint32_t bits, Vec from, T* to) {
        for (; bits != 0; bits &= bits - 1) *to++ = from.v[__builtin_ctz(bits)];
    }
    static void pack(uint32_t bits, int32_t first, int32_t* to) {
        for (; bits != 0; bits &= bits - 1) *to++ = first + __builtin_ctz(bits);
    }
#endif
};

#endif

// How many of the lanes from column j on there are.
template <typename T>
inline int lanes_at(int64_t j, int64_t columns) {
    return static_cast<int>(columns - j < Vec<T>::width ? columns - j : Vec<T>::width);
}

template <typename T>
inline uint32_t first_lanes(int n) {
    return n == Vec<T>::width ? ~uint32_t{0} : (uint32_t{1} << n) - 1;
}

// The same as with n lanes, quickly where that is all of them.
template <typename T>
inline Vec<T> load_some(const T* from, int n) {
    return n == Vec<T>::width ? Vec<T>::load(from) : Vec<T>::load(from, n);
}

template <typename T>
inline void store_some(Vec<T> v, T* to, int n) {
    if (n == Vec<T>::width)
        v.store(to);
    else
        v.store(to, n);
}

}  // namespace sparse_backend
