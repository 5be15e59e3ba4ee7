# cython: language_level=3
"""The guest's vector and opmask registers, which are the host's own: to memory and back, by number.

Only on hosts that have them: YMM 0-15 with AVX, ZMM 0-31 and K 0-7 with AVX-512 (F and BW).
"""

from libc.stdint cimport uint64_t

cdef extern from *:
    """
    #ifndef PYHYVE_BT_HOSTREGS
    #define PYHYVE_BT_HOSTREGS
    #define BT_ALL8(X, a) X(a, 0) X(a, 1) X(a, 2) X(a, 3) X(a, 4) X(a, 5) X(a, 6) X(a, 7)
    #define BT_ALL16(X, a) BT_ALL8(X, a) X(a, 8) X(a, 9) X(a, 10) X(a, 11) X(a, 12) X(a, 13) X(a, 14) X(a, 15)
    #define BT_ALL32(X, a) BT_ALL16(X, a) X(a, 16) X(a, 17) X(a, 18) X(a, 19) X(a, 20) X(a, 21) X(a, 22) X(a, 23) \\
        X(a, 24) X(a, 25) X(a, 26) X(a, 27) X(a, 28) X(a, 29) X(a, 30) X(a, 31)
    #define BT_STORE(insn, n) case n: __asm__ __volatile__(insn #n ", (%0)" : : "r"(at) : "memory"); break;
    #define BT_LOAD(insn, n) case n: __asm__ __volatile__(insn #n : : "r"(at) : "memory"); break;
    static inline void bt_get_mm(int reg, uint64_t at) { switch (reg) { BT_ALL8(BT_STORE, "movq %%mm") } }
    static inline void bt_get_xmm(int reg, uint64_t at) { switch (reg) { BT_ALL16(BT_STORE, "movups %%xmm") } }
    static inline void bt_get_ymm(int reg, uint64_t at) { switch (reg) { BT_ALL16(BT_STORE, "vmovdqu %%ymm") } }
    static inline void bt_set_ymm(int reg, uint64_t at) { switch (reg) { BT_ALL16(BT_LOAD, "vmovdqu (%0), %%ymm") } }
    static inline void bt_get_zmm(int reg, uint64_t at) { switch (reg) { BT_ALL32(BT_STORE, "vmovdqu64 %%zmm") } }
    static inline void bt_set_zmm(int reg, uint64_t at) { switch (reg) { BT_ALL32(BT_LOAD, "vmovdqu64 (%0), %%zmm") } }
    static inline void bt_get_k(int reg, uint64_t at) { switch (reg) { BT_ALL8(BT_STORE, "kmovq %%k") } }
    static inline void bt_set_k(int reg, uint64_t at) { switch (reg) { BT_ALL8(BT_LOAD, "kmovq (%0), %%k") } }
    #endif
    """
    void bt_get_mm(int reg, uint64_t at) noexcept nogil
    void bt_get_xmm(int reg, uint64_t at) noexcept nogil
    void bt_get_ymm(int reg, uint64_t at) noexcept nogil
    void bt_set_ymm(int reg, uint64_t at) noexcept nogil
    void bt_get_zmm(int reg, uint64_t at) noexcept nogil
    void bt_set_zmm(int reg, uint64_t at) noexcept nogil
    void bt_get_k(int reg, uint64_t at) noexcept nogil
    void bt_set_k(int reg, uint64_t at) noexcept nogil
