/* The guest of bench/interrupts.py: what an interrupt costs, from the timer's deadline or another processor to its
 * handler, and behind it.
 *
 * Prints on the first serial port
 *   START, then "M name count cycles" for each measurement (medians, by the time stamp counter),
 *   "T name" and "D name ticks" around each stretch of ticks, END cycles
 * and leaves out what the processor does not have. */

#include "bare.h"

#define SAMPLES 301
#define TRIPS 51                         /* where another processor may make each wait for the host's time slice */
#define DISTANCE_NS 200000u             /* from arming the timer to its deadline */
#define TICKS 2000u                     /* at 1,000 Hz */
#define TICK 0x50
#define PING 0x51
#define PONG 0x52
#define SELF 0x53
#define LEGACY 0x20
#define HPET 0xfed00000ul

#define NOTE_TIME "push %rax\npush %rdx\nrdtsc\nshl $32, %rdx\nor %rdx, %rax\nmov %rax, entered\npop %rdx\npop %rax\n"
HANDLER_AFTER(NOTE_TIME, on_tick, ticked);
HANDLER_AFTER(NOTE_TIME, on_self, came);
HANDLER(on_ping, pinged);
HANDLER(on_pong, ponged);
HANDLER(on_legacy, legacy_ticked);

volatile u64 entered;
static volatile u64 ticks, pongs, selves, eoi_cycles;
static volatile int want_x2apic, second_x2apic, second_halts;
static u64 samples[SAMPLES];
static u32 cycles_a_us;

enum timer { ONE_SHOT, PERIODIC, DEADLINE };

/* -- handlers ------------------------------------------------------------------------------------------------------- */

void came(void) {
    u64 start = clock();
    apic_write(0xb0, 0);
    eoi_cycles = clock() - start;
    selves = selves + 1;
}
void ticked(void) {
    apic_write(0xb0, 0);
    ticks = ticks + 1;
}
void pinged(void) {
    apic_write(0xb0, 0);
    apic_send(0, 0x4000 | PONG);
}
void ponged(void) {
    apic_write(0xb0, 0);
    pongs = pongs + 1;
}
void legacy_ticked(void) {
    out8(0x20, 0x20);
    ticks = ticks + 1;
}

void second(void) {
    load_idt();
    x2apic = 0;
    apic_write(0xf0, 0x1ff);
    second_ready = 1;
    for (;;) {
        if (want_x2apic && !second_x2apic) {
            write_msr(0x1b, read_msr(0x1b) | 0xc00);
            second_x2apic = 1;
        }
        if (second_halts)
            __asm__ volatile("sti\nhlt\ncli");
        else
            __asm__ volatile("sti\nnop\npause\ncli");
    }
}

/* -- measuring ------------------------------------------------------------------------------------------------------ */

static void report(const char *name, const char *mode, u64 cycles) {
    text("M "), text(name), text(mode), text(" 1 "), number(cycles), text("\r\n");
}
static u64 median(int count) {
    for (int i = 1; i < count; i++) {
        u64 sample = samples[i];
        int k = i;
        for (; k > 0 && samples[k - 1] > sample; k--)
            samples[k] = samples[k - 1];
        samples[k] = sample;
    }
    return samples[count / 2];
}
static void wait_for(volatile u64 *counter, u64 before, int halted) {
    while (*counter == before) {
        if (halted)
            __asm__ volatile("sti\nhlt\ncli" : : : "memory");
        else
            __asm__ volatile("sti\nnop\nnop\ncli" : : : "memory");
    }
}
static void set_timer(enum timer kind) {
    apic_write(0x3e0, 0xb);                                /* divide by 1 */
    apic_write(0x320, TICK | (u32)kind << 17);
}
static u64 arm(enum timer kind, u64 ns) {
    u64 now = clock();
    if (kind == DEADLINE) {
        now += ns * cycles_a_us / 1000;
        write_msr(0x6e0, now);
    } else {
        apic_write(0x380, (u32)ns);
    }
    return now;
}
static void latency(const char *name, enum timer kind, int halted) {
    set_timer(kind);
    for (int i = 0; i < SAMPLES; i++) {
        u64 before = ticks, deadline = arm(kind, DISTANCE_NS);
        wait_for(&ticks, before, halted);
        samples[i] = entered > deadline ? entered - deadline : 0;
        if (kind == ONE_SHOT)
            samples[i] -= (u64)DISTANCE_NS * cycles_a_us / 1000;
    }
    report(name, "", median(SAMPLES));
}
static void costs(const char *mode) {
    u64 sent[SAMPLES];
    for (int i = 0; i < SAMPLES; i++) {
        u64 before = selves, start = clock();
        apic_send(0, 0x44000 | SELF);
        wait_for(&selves, before, 0);
        sent[i] = entered - start;
        samples[i] = eoi_cycles;
    }
    report("eoi", mode, median(SAMPLES));
    for (int i = 0; i < SAMPLES; i++)
        samples[i] = sent[i];
    report("self_ipi", mode, median(SAMPLES));
    set_timer(ONE_SHOT);
    for (int i = 0; i < SAMPLES; i++) {
        u64 start = clock();
        apic_write(0x380, 2000000000);
        samples[i] = clock() - start;
    }
    report("timer_write", mode, median(SAMPLES));
    apic_write(0x380, 0);
}
static void deadline_costs(void) {
    set_timer(DEADLINE);
    for (int i = 0; i < SAMPLES; i++) {
        u64 start = clock();
        write_msr(0x6e0, start + 1000000ul * cycles_a_us);
        samples[i] = clock() - start;
    }
    write_msr(0x6e0, 0);
    report("deadline_write", "", median(SAMPLES));
}
static void round_trip(const char *name, const char *mode, int halted) {
    second_halts = halted;
    apic_send(1, 0x4000 | PING);                           /* out of its HLT */
    wait(2000u * cycles_a_us);
    for (int i = 0; i < TRIPS; i++) {
        if (halted)
            wait(20u * cycles_a_us);                       /* until it has halted again */
        u64 before = pongs, start = clock();
        apic_send(1, 0x4000 | PING);
        wait_for(&pongs, before, halted);
        samples[i] = clock() - start;
    }
    report(name, mode, median(TRIPS));
}

/* -- ticks ---------------------------------------------------------------------------------------------------------- */

static void tick(const char *name, int rearmed, enum timer kind) {
    wait(1000u * cycles_a_us);
    text("T "), text(name), text("\r\n");
    u64 first = ticks, next = clock();
    while (ticks - first < TICKS) {
        u64 before = ticks;
        if (rearmed) {
            next += 1000u * cycles_a_us;
            u64 now = clock();
            if (kind == DEADLINE)
                write_msr(0x6e0, next);
            else
                apic_write(0x380, next > now ? (u32)((next - now) * 1000 / cycles_a_us) + 1 : 1);
        }
        wait_for(&ticks, before, 1);
    }
    text("D "), text(name), put(' '), number(TICKS), text("\r\n");
}
static void tick_local(const char *name, enum timer kind) {
    set_timer(kind);
    if (kind == PERIODIC)
        apic_write(0x380, 1000000);
    tick(name, kind != PERIODIC, kind);
    apic_write(0x320, 0x10000);
}
static void legacy_enable(void) {
    static const u8 commands[][2] = {{0x20, 0x11}, {0xa0, 0x11}, {0x21, LEGACY}, {0xa1, LEGACY + 8},
                                     {0x21, 4}, {0xa1, 2}, {0x21, 1}, {0xa1, 1}, {0x21, 0xff}, {0xa1, 0xff}};
    for (unsigned i = 0; i < sizeof commands / sizeof *commands; i++)
        out8(commands[i][0], commands[i][1]);
    apic_write(0x350, 0x700);                              /* LINT0: ExtINT */
}
static void tick_legacy(const char *name) {
    out8(0x21, 0xfe);
    tick(name, 0, PERIODIC);
    out8(0x21, 0xff);
}
static void hpet_write(u32 reg, u64 value) {
    *(volatile u32 *)(HPET + reg) = (u32)value;
    *(volatile u32 *)(HPET + reg + 4) = (u32)(value >> 32);
}

/* -- all of it ------------------------------------------------------------------------------------------------------ */

/* By the HPET, whose period it tells. */
static void calibrate(void) {
    u64 femtoseconds = *(volatile u32 *)(HPET + 4);
    u32 wanted = (u32)(50000000000000ul / femtoseconds);   /* 50 ms */
    hpet_write(0x10, 1);
    u32 from = *(volatile u32 *)(HPET + 0xf0), spent;
    u64 start = clock();
    while ((spent = *(volatile u32 *)(HPET + 0xf0) - from) < wanted)
        ;
    cycles_a_us = (u32)((clock() - start) * 1000 / (spent * femtoseconds / 1000000));
    hpet_write(0x10, 0);
}

void main(void) {
    roots[3 * 512 + (HPET >> 21 & 511)] = (HPET & ~0x1ffffful) | 0x97;
    set_gates();
    gate(TICK, on_tick), gate(PING, on_ping), gate(PONG, on_pong), gate(SELF, on_self), gate(LEGACY, on_legacy);
    int has_x2apic = cpuid_1_ecx() >> 21 & 1, has_deadline = cpuid_1_ecx() >> 24 & 1;
    apic_write(0xf0, 0x1ff);
    legacy_enable();
    text("START\r\n");
    u64 start = clock();
    calibrate();
    latency("oneshot_halted", ONE_SHOT, 1);
    latency("oneshot_spinning", ONE_SHOT, 0);
    costs("");
    start_second();
    round_trip("ipi_spinning", "", 0);
    round_trip("ipi_halted", "", 1);
    tick_local("tick_periodic", PERIODIC);
    tick_local("tick_oneshot", ONE_SHOT);
    out8(0x43, 0x34), out8(0x40, 1193 & 255), out8(0x40, 1193 >> 8);
    tick_legacy("tick_pit");
    out8(0x43, 0x30);                                      /* it stands still until it gets a count */
    u64 period = 1000000000000ul / *(volatile u32 *)(HPET + 4);
    hpet_write(0x10, 0), hpet_write(0xf0, 0);
    *(volatile u32 *)(HPET + 0x100) = 0x14c;               /* periodic, 32 bits, the count is set first */
    *(volatile u32 *)(HPET + 0x108) = (u32)period, *(volatile u32 *)(HPET + 0x108) = (u32)period;
    hpet_write(0x10, 3);
    tick_legacy("tick_hpet");
    hpet_write(0x10, 0);
    if (has_deadline) {
        latency("deadline_halted", DEADLINE, 1);
        latency("deadline_spinning", DEADLINE, 0);
        deadline_costs();
        tick_local("tick_deadline", DEADLINE);
    }
    if (has_x2apic) {
        want_x2apic = 1;
        apic_send(1, 0x4000 | PING);
        while (!second_x2apic)
            __asm__ volatile("pause");
        write_msr(0x1b, read_msr(0x1b) | 0xc00);
        x2apic = 1;
        costs("_x2apic");
        round_trip("ipi_spinning", "_x2apic", 0);
        round_trip("ipi_halted", "_x2apic", 1);
    }
    u64 spent = clock() - start;
    text("END "), number(spent), text("\r\n");
    end(PASSED);
}
