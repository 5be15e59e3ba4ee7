/* The guest of bench/engine.py: 64-bit code without an operating system that measures the processor it runs on.
 *
 * A Multiboot image, so that pyhyve and QEMU load the same bytes. Prints on the first serial port
 *   START, then "M name count cycles" for each measurement (the best of nine, by the time stamp counter), END cycles
 * and ends by the debug-exit port. */

#include "bare.h"

#define PAGE 4096ul
#define ROUNDS 9
#define CODE 0x4000000ul            /* generated code */
#define DATA 0x6000000ul            /* 32 MiB in pages of 4 KiB */
#define DATA_PAGES 8192ul
#define ABSENT 0x40000000ul         /* no page is there */
#define IPI 0x40

__asm__(
    ".globl on_page_fault, on_software, on_syscall, user, user_end\n"
    "on_page_fault: add $8, %rsp\naddq $2, (%rsp)\niretq\n"
    "on_software: iretq\n"
    /* rax: 0 a system call, else back to the kernel */
    "on_syscall: test %eax, %eax\njnz 1f\nsysretq\n1: mov kernel_stack, %rsp\nret\n"
    ".balign 4096\nuser: mov %rdi, %r12\n1: xor %eax, %eax\nsyscall\ndec %r12\njnz 1b\nmov $1, %eax\nsyscall\n"
    ".balign 4096\n.globl run_user\nrun_user: push %rbx\npush %rbp\npush %r12\npush %r13\npush %r14\npush %r15\nlea -8(%rsp), %rax\n"
    "lea 1f(%rip), %rcx\nmov %rcx, (%rax)\nmov %rax, kernel_stack\nlea user(%rip), %rcx\nmov $0x2, %r11d\nsysretq\n"
    "1: pop %r15\npop %r14\npop %r13\npop %r12\npop %rbp\npop %rbx\nret\n"
    ".balign 4096\nnear_call: mov %rdi, %rcx\n1: .rept 8\ncall 2f\n.endr\ndec %rcx\njnz 1b\nret\n2: ret\n"
    "far_call: mov %rdi, %rcx\n1: .rept 8\ncall elsewhere\n.endr\ndec %rcx\njnz 1b\nret\n"
    "indirect_call: mov %rdi, %rcx\nlea elsewhere(%rip), %rax\n1: .rept 8\ncall *%rax\n.endr\ndec %rcx\njnz 1b\nret\n"
    "near_jump: mov %rdi, %rcx\n1: .rept 16\njmp 2f\n2:\n.endr\ndec %rcx\njnz 1b\nret\n"
    "recursion: dec %rdi\njz 1f\ncall recursion\n1: ret\n"
    ".balign 4096\nelsewhere: ret\n");

HANDLER(on_ipi, received);
extern char on_page_fault[], on_software[], on_syscall[];
extern void run_user(u64 count), near_call(u64), far_call(u64), indirect_call(u64), near_jump(u64), recursion(u64);
extern u64 gdt[];

u64 other_roots[3 * 512] __attribute__((aligned(4096)));
u64 small_tables[DATA_PAGES] __attribute__((aligned(4096)));
u64 kernel_stack;

static volatile u64 received_count, second_mode;
static u64 random_state = 1;

/* -- the machine ---------------------------------------------------------------------------------------------------- */

static void set_cr3(const void *root) { __asm__ volatile("mov %0, %%cr3" : : "r"(root) : "memory"); }

static u64 draw(void) {
    random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
    return random_state;
}

void received(void) {
    apic_write(0xb0, 0);
    received_count = received_count + 1;
}

void second(void) {
    load_idt();
    apic_enable();
    __asm__ volatile("sti");
    second_ready = 1;
    for (;;) {
        if (second_mode == 0)
            __asm__ volatile("pause");
        else if (second_mode == 1)
            __asm__ volatile("hlt");
    }
}

/* -- measuring ------------------------------------------------------------------------------------------------------ */

static void measure(const char *name, u64 count, void (*run)(u64), u64 argument) {
    u64 best = ~0ul;
    for (int round = 0; round < ROUNDS; round++) {
        u64 start = clock();
        run(argument);
        u64 spent = clock() - start;
        if (spent < best)
            best = spent;
    }
    text("M "), text(name), put(' '), number(count), put(' '), number(best), text("\r\n");
}

typedef void (*function)(void);

/* Code that nobody has run: arithmetic, a store and a load, a branch that is not taken; about a dozen a block. */
static u8 *fresh = (u8 *)CODE;
static u64 new_instructions;

static void generate(u64 blocks) {
    u8 *at = fresh;
    u64 made = 0;
    for (u64 i = 0; i < blocks; i++) {
        for (int k = 0; k < 3; k++) {
            static const u8 body[] = {
                0x48, 0x8d, 0x84, 0x07, 0, 0, 0, 0,        /* lea rax, [rdi + rax + n] */
                0x48, 0x31, 0xc2,                          /* xor rdx, rax */
                0x48, 0x83, 0xc0, 0,                       /* add rax, n */
                0x48, 0x89, 0x47, 0,                       /* mov [rdi + n], rax */
            };
            for (unsigned j = 0; j < sizeof body; j++)
                at[j] = body[j];
            u32 n = (u32)draw();
            at[4] = (u8)n, at[5] = (u8)(n >> 8), at[14] = (u8)(n >> 16), at[18] = (u8)(n >> 24) & 0x78;
            at += sizeof body, made += 4;
        }
        *at++ = 0x85, *at++ = 0xff;                        /* test edi, edi */
        *at++ = 0x74, *at++ = 0x7f;                        /* jz: not taken */
        *at++ = 0xeb, *at++ = 0;                           /* jmp to the next */
        made += 3;
    }
    *at++ = 0xc3;
    fresh = at;
    new_instructions = made + 1;
}


static void measure_translation(void) {
    u64 best = ~0ul;
    for (int round = 0; round < ROUNDS; round++) {
        u8 *code = fresh;
        generate(3000);
        u64 start = clock();
        u64 at = (u64)code;
        __asm__ volatile("call *%0" : "+r"(at) : "D"(DATA) : "rax", "rdx", "memory", "cc");
        u64 spent = clock() - start;
        if (spent < best)
            best = spent;
    }
    text("M translate "), number(new_instructions), put(' '), number(best), text("\r\n");
}

/* A chain of indirect jumps through `n` pieces of code, in random order. */
static u64 chain_start, chain_table;

static void make_chain(u64 n) {
    u8 *base = fresh = (u8 *)(((u64)fresh + PAGE) & ~(PAGE - 1));
    u64 *table = (u64 *)(DATA + (16ul << 20));
    for (u64 i = 0; i < n; i++)
        table[i] = (u64)(base + 64 * i);
    for (u64 i = n - 1; i > 0; i--) {
        u64 k = draw() % (i + 1), kept = table[i];
        table[i] = table[k], table[k] = kept;
    }
    for (u64 i = 0; i < n; i++) {
        static const u8 piece[] = {0x48, 0x8b, 0x07, 0x48, 0x83, 0xc7, 0x08, 0xff, 0xe0};
        for (unsigned j = 0; j < sizeof piece; j++)        /* mov rax, [rdi]; add rdi, 8; jmp rax */
            base[64 * i + j] = piece[j];
    }
    fresh = base + 64 * n;
    *fresh = 0xc3;
    table[n] = (u64)fresh++;
    chain_start = table[0], chain_table = (u64)(table + 1);
}
static void run_chain(u64 times) {
    while (times--) {
        u64 table = chain_table;
        __asm__ volatile("call *%1" : "+D"(table) : "r"(chain_start) : "rax", "memory", "cc");
    }
}

static void loads(u64 count) {
    u64 at = DATA;
    *(volatile u64 *)at = at;
    for (; count; count -= 8)
        __asm__ volatile(".rept 8\nmov (%0), %0\n.endr" : "+r"(at) : : "memory");
}
static void stores(u64 count) {
    u64 at = DATA;
    for (; count; count -= 8)
        __asm__ volatile("mov %0, (%0)\nmov %0, 256(%1)\nmov %0, (%0)\nmov %0, 512(%1)\n"
                         "mov %0, (%0)\nmov %0, 256(%1)\nmov %0, (%0)\nmov %0, 512(%1)" : : "r"(at), "r"(at) : "memory");
}
static void make_walk(u64 n) {
    u64 previous = 0, order = 1;
    for (u64 i = 0; i < n; i++) {
        u64 next = (previous + order * 4097 + 1) % n;      /* far apart; every page once, for n a power of two */
        *(volatile u64 *)(DATA + previous * PAGE + (previous & 63) * 64) = DATA + next * PAGE + (next & 63) * 64;
        previous = next;
    }
}
static void walk(u64 count) {
    u64 at = DATA;
    for (; count; count -= 8)
        __asm__ volatile(".rept 8\nmov (%0), %0\n.endr" : "+r"(at) : : "memory");
}
static void faults(u64 count) {
    u64 at = ABSENT;
    while (count--)
        __asm__ volatile("movb (%0), %%al" : : "D"(at) : "rax", "memory");
}
static void interrupts(u64 count) {
    while (count--)
        __asm__ volatile("int $0x41" : : : "memory");
}
static void flushes(u64 count) {
    while (count--)
        set_cr3(roots);
}
/* Two address spaces, and eight pages of data that each touches: what a switch of processes costs at least. */
static void switches(u64 count) {
    while (count--) {
        set_cr3(count & 1 ? other_roots : roots);
        for (u64 page = 0; page < 8; page++)
            *(volatile u64 *)(DATA + page * PAGE) += 1;
    }
}
static void outs(u64 count) {
    while (count--)
        out8(0x3ff, 0x55);
}
static void cpuids(u64 count) {
    while (count--) {
        u32 a = 0, b, c, d;
        __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "=c"(c), "=d"(d));
    }
}
static void rewrites(u64 count) {
    volatile u8 *code = (u8 *)(((u64)fresh + 64) & ~63ul);
    code[0] = 0xb8, code[1] = 0, code[2] = 0, code[3] = 0, code[4] = 0, code[5] = 0xc3;
    while (count--) {
        code[1] = (u8)count;
        ((function)(u64)code)();
    }
}
static void sends(u64 count) {
    while (count--) {
        u64 before = received_count;
        if (second_mode == 1)
            wait(20000);                                   /* until it has halted again; taken off below */
        apic_send(1, 0x4000 | IPI);
        while (received_count == before)
            __asm__ volatile("pause");
    }
}
static void waits(u64 count) {
    while (count--)
        wait(20000);
}

static void set_up(void) {
    set_gates();
    gate(14, on_page_fault), gate(IPI, on_ipi), gate(0x41, on_software);
    write_msr(0xc0000081, 0x18ul << 48 | 8ul << 32);
    write_msr(0xc0000082, (u64)on_syscall);
    write_msr(0xc0000084, 0x700);
    for (u64 page = 0; page < DATA_PAGES; page++)
        small_tables[page] = (DATA + page * PAGE) | 0x67;
    for (u64 i = 0; i < DATA_PAGES / 512; i++)
        roots[2 * 512 + (DATA >> 21) + i] = (u64)(small_tables + 512 * i) | 7;
    for (int i = 0; i < 512; i++) {
        other_roots[i] = i ? 0 : (u64)(other_roots + 512) | 7;
        other_roots[512 + i] = i ? roots[512 + i] : (u64)(other_roots + 1024) | 7;
        other_roots[1024 + i] = roots[1024 + i];
    }
    set_cr3(roots);
    apic_enable();
}

void main(void) {
    set_up();
    text("START\r\n");
    u64 start = clock();
    measure_translation();
    measure("jump_same_page", 16 * 20000, near_jump, 20000);
    make_chain(16), measure("jump_indirect_16", 16 * 4000, run_chain, 4000);
    make_chain(1024), measure("jump_indirect_1024", 1024 * 60, run_chain, 60);
    make_chain(32768), measure("jump_indirect_32768", 32768, run_chain, 1);
    measure("call_same_page", 8 * 5000, near_call, 5000);
    measure("call_other_page", 8 * 5000, far_call, 5000);
    measure("call_indirect", 8 * 5000, indirect_call, 5000);
    measure("call_recursive", 500, recursion, 500);
    measure("load", 400000, loads, 400000);
    measure("store", 800000, stores, 800000);
    make_walk(64), measure("load_64_pages", 400000, walk, 400000);
    make_walk(DATA_PAGES), measure("tlb_miss", 8192, walk, 8192);
    measure("page_fault", 1000, faults, 1000);
    measure("interrupt", 2000, interrupts, 2000);
    measure("syscall", 3000, run_user, 3000);
    measure("cr3_write", 500, flushes, 500);
    measure("context_switch", 200, switches, 200);
    set_cr3(roots);
    measure("code_rewrite", 100, rewrites, 100);
    measure("cpuid", 20000, cpuids, 20000);
    measure("out", 1000, outs, 1000);
    start_second();
    measure("ipi_running", 20, sends, 20);
    second_mode = 2;
    measure("ipi_spinning", 10, sends, 10);
    second_mode = 1;
    apic_send(1, 0x4000 | IPI);
    measure("ipi_halted", 50, sends, 50);
    measure("wait", 50, waits, 50);
    u64 spent = clock() - start;
    text("END "), number(spent), text("\r\n");
    end(PASSED);
}
