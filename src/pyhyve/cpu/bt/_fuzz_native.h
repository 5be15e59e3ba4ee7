/* The host's own processor as an oracle: code of any size in user mode, with a given state, in this process.

   What the code does to the processor is kept in struct fz_context, which lies at a fixed low address so that no register
   is needed to find it. An exception comes as a signal; its handler notes what the processor said and goes on in fz_back. */
#ifndef PYHYVE_FUZZ_NATIVE_H
#define PYHYVE_FUZZ_NATIVE_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define FZ_BASE 0x30000000ull
#define FZ_NONE 255            /* no exception */

struct fz_context {
    uint64_t gpr[16];
    uint64_t flags;            /* 0x80 */
    uint32_t far_offset;       /* 0x88 */
    uint16_t far_selector;
    uint16_t pad0;
    uint64_t host_rsp;         /* 0x90 */
    uint64_t host_fs;          /* 0x98 */
    uint64_t fs_base;          /* 0xa0 */
    uint64_t gs_base;          /* 0xa8 */
    uint16_t sel[6];           /* 0xb0: ES CS SS DS FS GS */
    uint32_t xcr0;             /* 0xbc */
    uint64_t vector;           /* 0xc0 */
    uint64_t error;            /* 0xc8 */
    uint64_t cr2;              /* 0xd0 */
    uint64_t rip;              /* 0xd8 */
    uint64_t fault_flags;      /* 0xe0 */
    uint64_t fault_cs;         /* 0xe8 */
    uint64_t fault_ss;         /* 0xf0 */
    uint64_t end;              /* 0xf8: 1: left by the common end */
    uint64_t back;             /* 0x100: address of fz_back */
    uint64_t inside;           /* 0x108 */
    uint16_t out_sel[6];       /* 0x110 */
    uint32_t pad1;             /* 0x11c */
    uint64_t back_end;         /* 0x120: address of the trampoline that sets `end` */
    uint32_t mxcsr;            /* 0x128 */
    uint32_t pad2;
    uint64_t stepped;          /* 0x130: flags at a single-step trap behind the code */
};
#define FZ ((volatile struct fz_context *)FZ_BASE)
#define FZ_XS_IN (FZ_BASE + 0x400)
#define FZ_XS_OUT (FZ_BASE + 0x1000)
#define FZ_BACK (FZ_BASE + 0x2000)        /* trampolines */
#define FZ_BACK_END (FZ_BASE + 0x2010)

extern void fz_enter(void);
extern void fz_back(void);

__asm__(
    ".text\n.p2align 4\n.local fz_enter\nfz_enter:\n"
    "  push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15\n"
    "  mov %rsp, 0x30000090\n"
    "  rdfsbase %rax; mov %rax, 0x30000098\n"
    "  stmxcsr 0x30000128\n"
    "  mov 0x300000bc, %eax; xor %edx, %edx; xrstor64 0x30000400\n"
    "  movzwl 0x300000b0, %eax; mov %eax, %es\n"
    "  movzwl 0x300000b6, %eax; mov %eax, %ds\n"
    "  movzwl 0x300000b8, %eax; mov %eax, %fs\n"
    "  movzwl 0x300000ba, %eax; mov %eax, %gs\n"
    "  mov 0x300000a0, %rax; wrfsbase %rax\n"
    "  mov 0x300000a8, %rax; wrgsbase %rax\n"
    "  pushq 0x30000080; popfq\n"
    "  mov 0x30000000, %rax; mov 0x30000008, %rcx; mov 0x30000010, %rdx; mov 0x30000018, %rbx\n"
    "  mov 0x30000028, %rbp; mov 0x30000030, %rsi; mov 0x30000038, %rdi\n"
    "  mov 0x30000040, %r8; mov 0x30000048, %r9; mov 0x30000050, %r10; mov 0x30000058, %r11\n"
    "  mov 0x30000060, %r12; mov 0x30000068, %r13; mov 0x30000070, %r14; mov 0x30000078, %r15\n"
    "  mov 0x300000b4, %ss\n"
    "  mov 0x30000020, %rsp\n"
    "  ljmp *0x30000088\n"
    ".local fz_back\nfz_back:\n"
    "  mov %rax, 0x30000000; mov %rcx, 0x30000008; mov %rdx, 0x30000010; mov %rbx, 0x30000018\n"
    "  mov %rsp, 0x30000020; mov %rbp, 0x30000028; mov %rsi, 0x30000030; mov %rdi, 0x30000038\n"
    "  mov %r8, 0x30000040; mov %r9, 0x30000048; mov %r10, 0x30000050; mov %r11, 0x30000058\n"
    "  mov %r12, 0x30000060; mov %r13, 0x30000068; mov %r14, 0x30000070; mov %r15, 0x30000078\n"
    "  mov %ss, 0x30000114\n"
    "  mov $0x2b, %eax; mov %eax, %ss\n"
    "  mov 0x30000090, %rsp\n"
    "  pushfq; popq 0x30000080\n"
    "  pushq $0x202; popfq\n"
    "  mov %es, 0x30000110; mov %ds, 0x30000116; mov %fs, 0x30000118; mov %gs, 0x3000011a\n"
    "  rdfsbase %rax; mov %rax, 0x300000a0\n"
    "  rdgsbase %rax; mov %rax, 0x300000a8\n"
    "  mov 0x300000bc, %eax; xor %edx, %edx; xsave64 0x30001000\n"
    "  xor %eax, %eax; mov %eax, %es; mov %eax, %ds; mov %eax, %fs; mov %eax, %gs\n"
    "  mov 0x30000098, %rax; wrfsbase %rax\n"
    "  xor %eax, %eax; wrgsbase %rax\n"
    "  vzeroupper; fninit; ldmxcsr 0x30000128\n"
    "  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx; ret\n");

static struct sigaction fz_old[65];

/* FS may be anything here: no stack protector, no thread-local variable, no library call. */
__attribute__((no_stack_protector, noinline)) static void fz_signal(int sig, siginfo_t *info, void *context) {
    greg_t *g = ((ucontext_t *)context)->uc_mcontext.gregs;
    uint64_t segments;
    if (!FZ->inside) {
        if (fz_old[sig].sa_flags & SA_SIGINFO) {
            fz_old[sig].sa_sigaction(sig, info, context);
        } else {
            signal(sig, SIG_DFL);
        }
        return;
    }
    segments = (uint64_t)g[REG_CSGSFS];
    if (g[REG_TRAPNO] == 1 && ((uint64_t)g[REG_RIP] - FZ_BACK < 0x20 || (uint64_t)g[REG_RIP] == FZ->back)) {
        /* single-stepping: the code was left before this trap */
        FZ->stepped = (uint64_t)g[REG_EFL];
        g[REG_EFL] &= ~0x100ll;
        return;
    }
    FZ->vector = (uint64_t)g[REG_TRAPNO];
    FZ->error = (uint64_t)g[REG_ERR];
    FZ->cr2 = (uint64_t)g[REG_CR2];
    FZ->rip = (uint64_t)g[REG_RIP];
    FZ->fault_flags = (uint64_t)g[REG_EFL];
    FZ->fault_cs = segments & 0xffff;
    FZ->fault_ss = segments >> 48;
    g[REG_RIP] = (greg_t)FZ->back;
    g[REG_EFL] = 0x202;
    g[REG_CSGSFS] = (greg_t)((segments & 0x0000ffffffff0000ull) | 0x33 | 0x2bull << 48);
}

/* Map the window (all of it without access) and take the processor's exceptions. 0, or an error's line. */
static const char *fz_init(uint64_t size) {
    static const int sigs[] = {SIGFPE, SIGILL, SIGSEGV, SIGBUS, SIGTRAP};
    static const unsigned char trampolines[] = {
        0xff, 0x24, 0x25, 0x00, 0x01, 0x00, 0x30, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc,
        0xc6, 0x04, 0x25, 0xf8, 0x00, 0x00, 0x30, 0x01, 0xff, 0x24, 0x25, 0x00, 0x01, 0x00, 0x30, 0xcc};
    struct sigaction sa;
    stack_t stack;
    unsigned i;
    void *at = mmap((void *)FZ_BASE, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    if (at != (void *)FZ_BASE)
        return "the low addresses for native code are in use";
    if (mprotect((void *)FZ_BASE, 0x2000, PROT_READ | PROT_WRITE) ||
        mprotect((void *)FZ_BACK, 0x1000, PROT_READ | PROT_WRITE))
        return "mprotect fails";
    memcpy((void *)FZ_BACK, trampolines, sizeof trampolines);
    if (mprotect((void *)FZ_BACK, 0x1000, PROT_READ | PROT_EXEC))
        return "memory cannot be made executable";
    FZ->back = (uint64_t)fz_back;
    FZ->back_end = FZ_BACK_END;
    stack.ss_size = 1 << 16;
    stack.ss_flags = 0;
    stack.ss_sp = mmap(NULL, stack.ss_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (sigaltstack(&stack, NULL))
        return "sigaltstack fails";
    for (i = 0; i < sizeof sigs / sizeof *sigs; i++) {
        memset(&sa, 0, sizeof sa);
        sa.sa_sigaction = fz_signal;
        sa.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        sigfillset(&sa.sa_mask);
        if (sigaction(sigs[i], &sa, &fz_old[sigs[i]]))
            return "sigaction fails";
    }
    return NULL;
}

static void fz_run(void) {
    FZ->vector = FZ_NONE;
    FZ->end = 0;
    FZ->stepped = 0;
    FZ->inside = 1;
    fz_enter();
    FZ->inside = 0;
}

static void fz_cpuid(unsigned leaf, unsigned subleaf, unsigned *out) {
    __asm__("cpuid" : "=a"(out[0]), "=b"(out[1]), "=c"(out[2]), "=d"(out[3]) : "a"(leaf), "c"(subleaf));
}

static int fz_protect(uint64_t at, uint64_t size, int prot) { return mprotect((void *)at, size, prot); }

/* A segment of the local descriptor table: as Linux's struct user_desc has it. */
static long fz_ldt(unsigned entry, unsigned base, unsigned limit, unsigned flags) {
    struct { unsigned entry_number, base_addr, limit, flags; } d = {entry, base, limit, flags};
    return syscall(SYS_modify_ldt, 1, &d, sizeof d);
}
#endif
