/* Code without an operating system, for the guests of the benchmarks: a Multiboot header, 64-bit mode with the first
 * GiB and the local APIC's page mapped, a second processor, a serial port, interrupt gates, the local APIC.
 *
 * A guest has main() and second(), which the second processor runs once start_second() was called, and stubs for its
 * interrupts: HANDLER(on_x, x) calls the C function x() and returns by IRET. It prints on the first serial port, and
 * ends by the debug-exit port: end(PASSED). */

#include <stdint.h>

typedef uint64_t u64;
typedef uint32_t u32;
typedef uint8_t u8;

#define TRAMPOLINE 0x8000
#define PASSED 0x10

/* An interrupt's entry: `early` runs first, with every register the interrupted code's. */
#define HANDLER_AFTER(early, stub, function)                                                                            \
    __asm__(".globl " #stub "\n" #stub ": " early                                                                       \
            "push %rax\npush %rcx\npush %rdx\npush %rsi\npush %rdi\npush %r8\npush %r9\npush %r10\npush %r11\n"         \
            "call " #function "\npop %r11\npop %r10\npop %r9\npop %r8\npop %rdi\npop %rsi\npop %rdx\npop %rcx\n"       \
            "pop %rax\niretq\n");                                                                                       \
    extern char stub[]
#define HANDLER(stub, function) HANDLER_AFTER("", stub, function)

__asm__(
    ".section .head, \"ax\"\n.code32\n"
    "header: .long 0x1badb002, 0x10000, -(0x1badb002 + 0x10000), header, header, image_end, bss_end, start\n"
    "start: cli\nmov $stack_top, %esp\nmov $roots, %eax\ncall long_mode\nljmp $8, $start64\n"
    /* eax: the page tables' root */
    "long_mode: mov %eax, %cr3\nmov %cr4, %eax\nor $0x620, %eax\nmov %eax, %cr4\n"
    "mov $0xc0000080, %ecx\nrdmsr\nor $0x101, %eax\nwrmsr\n"
    "push %edi\nmov $roots, %edi\nlea 0x1007(%edi), %eax\nmov %eax, (%edi)\n"
    "lea 0x2007(%edi), %eax\nmov %eax, 0x1000(%edi)\n"
    "mov $0x87, %eax\nxor %ecx, %ecx\n1: mov %eax, 0x2000(%edi, %ecx, 8)\nadd $0x200000, %eax\ninc %ecx\n"
    "cmp $512, %ecx\njb 1b\n"
    "mov $0xfee00087, %eax\nand $0xffe00087, %eax\nlea 0x3007(%edi), %ecx\nmov %ecx, 0x1018(%edi)\nmov %eax, 0x3fb8(%edi)\n"
    "pop %edi\nmov %cr0, %eax\nand $0xfffffffb, %eax\nor $0x80000002, %eax\nmov %eax, %cr0\nlgdt gdtr\nret\n"
    ".balign 8\n.globl gdt\ngdt: .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00cffb000000ffff, 0x00cff3000000ffff\n"
    ".quad 0x00affb000000ffff, 0, 0\n"
    "gdtr: .word 63\n.quad gdt\n"
    ".code16\n.globl trampoline, trampoline_end\ntrampoline: cli\nxor %ax, %ax\nmov %ax, %ds\n"
    "lgdtl 0x8000 + small_gdtr - trampoline\nmov %cr4, %eax\nor $0x620, %eax\nmov %eax, %cr4\nmov $roots, %eax\n"
    "mov %eax, %cr3\nmov $0xc0000080, %ecx\nrdmsr\nor $0x101, %eax\nwrmsr\nmov %cr0, %eax\nand $0x9ffffffb, %eax\n"
    "or $0x80000003, %eax\nmov %eax, %cr0\nljmpl $8, $second64\n"
    "small_gdtr: .word 63\n.long gdt\ntrampoline_end:\n"
    ".code64\nstart64: mov $16, %eax\nmov %eax, %ds\nmov %eax, %es\nmov %eax, %ss\nmov $stack_top, %esp\ncall main\n1: hlt\njmp 1b\n"
    "second64: mov $16, %eax\nmov %eax, %ds\nmov %eax, %es\nmov %eax, %ss\nmov $second_top, %esp\ncall second\n1: hlt\njmp 1b\n"
    ".globl on_other\non_other: mov (%rsp), %rdi\nmov 8(%rsp), %rsi\ncall unexpected\n");

extern char trampoline[], trampoline_end[], on_other[];

u64 roots[4 * 512] __attribute__((aligned(4096)));  /* PML4, PDPT, PD of the first GiB, PD of the fourth */
u64 idt[512] __attribute__((aligned(16)));
u8 stack[65536] __attribute__((aligned(16))), second_stack[16384] __attribute__((aligned(16)));
__asm__(".globl stack_top, second_top\nstack_top = stack + 65536\nsecond_top = second_stack + 16384");

void main(void), second(void);
static volatile u64 second_ready;
static int x2apic;

static void out8(u32 port, u32 value) { __asm__ volatile("outb %b0, %w1" : : "a"(value), "d"(port)); }
static u8 in8(u32 port) {
    u8 value;
    __asm__ volatile("inb %w1, %0" : "=a"(value) : "d"(port));
    return value;
}
static u64 clock(void) {
    u32 low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high) : : "memory");
    return (u64)high << 32 | low;
}
static u64 read_msr(u32 number) {
    u32 low, high;
    __asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(number));
    return (u64)high << 32 | low;
}
static void write_msr(u32 number, u64 value) {
    __asm__ volatile("wrmsr" : : "c"(number), "a"((u32)value), "d"((u32)(value >> 32)) : "memory");
}
static void put(char c) {
    while (!(in8(0x3fd) & 0x20))
        ;
    out8(0x3f8, (u8)c);
}
static void text(const char *s) {
    while (*s)
        put(*s++);
}
static void number(u64 n) {
    char digits[20];
    int at = 0;
    do
        digits[at++] = (char)('0' + n % 10);
    while (n /= 10);
    while (at)
        put(digits[--at]);
}
static void end(u32 status) {
    for (;;)
        out8(0xf4, status);
}
void unexpected(u64 first, u64 secnd) {
    text("UNEXPECTED exception ");
    number(first), text(" "), number(secnd), text("\r\n");
    end(PASSED + 1);
}
static void gate(int vector, const char *handler) {
    u64 at = (u64)handler;
    idt[2 * vector] = (at & 0xffff) | 8ul << 16 | 0x8eul << 40 | (at >> 16 & 0xffff) << 48;
    idt[2 * vector + 1] = at >> 32;
}
static void load_idt(void) {
    struct __attribute__((packed)) {
        uint16_t limit;
        u64 base;
    } table = {sizeof idt - 1, (u64)idt};
    __asm__ volatile("lidt %0" : : "m"(table));
}
/* Every vector but those that the guest has something for is unexpected. */
static void set_gates(void) {
    for (int vector = 0; vector < 256; vector++)
        gate(vector, on_other);
    load_idt();
}

static void apic_write(u32 reg, u32 value) {
    if (x2apic)
        write_msr(0x800 + (reg >> 4), value);
    else
        *(volatile u32 *)(0xfee00000ul + reg) = value;
}
static void apic_send(u32 target, u32 command) {
    if (x2apic) {
        write_msr(0x830, (u64)target << 32 | command);
    } else {
        *(volatile u32 *)0xfee00310ul = target << 24;
        *(volatile u32 *)0xfee00300ul = command;
    }
}
static u32 cpuid_1_ecx(void) {
    u32 a = 1, b, c, d;
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "=c"(c), "=d"(d));
    return c;
}
/* In x2APIC mode where the processor has that. */
static void apic_enable(void) {
    x2apic = cpuid_1_ecx() >> 21 & 1;
    if (x2apic)
        write_msr(0x1b, read_msr(0x1b) | 0xc00);
    apic_write(0xf0, 0x1ff);
}

static void wait(u64 cycles) {
    u64 start = clock();
    while (clock() - start < cycles)
        __asm__ volatile("pause");
}

static void start_second(void) {
    for (char *from = trampoline; from < trampoline_end; from++)
        ((volatile char *)TRAMPOLINE)[from - trampoline] = *from;
    apic_send(1, 0x4500);
    wait(30000000);
    apic_send(1, 0x4600 | TRAMPOLINE >> 12);
    for (u64 start = clock(); !second_ready && clock() - start < 10000000000ul;)
        __asm__ volatile("pause");
    if (!second_ready) {
        text("UNEXPECTED no second processor\r\n");
        end(PASSED + 1);
    }
}
