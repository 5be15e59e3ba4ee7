/* The stress program of bench/soak.py: processes and threads that check themselves, all the time.
 *
 *   soak SEED WORKERS SECONDS    run; each line that it prints is one of
 *                                  EPOCH worker number digest      an epoch of a worker is done
 *                                  WRONG worker number task what   and everything ends with status 1
 *   soak SEED WORKER NUMBER replay    one epoch, here: prints its digest
 *
 * An epoch is a few tasks drawn by a generator that SEED, worker and number start, and its digest depends on nothing
 * else; so an epoch of a guest can be held against the same epoch on the host. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096
#define THREADS 4
#define TASKS_PER_EPOCH 8

typedef uint64_t u64;

static u64 generator;
static int worker;
static long epoch;
static const char *task_name = "";
static const char *self = "/soak";

static u64 mix(u64 x) {
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

static u64 draw(void) {
    generator += 0x9e3779b97f4a7c15u;
    return mix(generator);
}

static int below(int n) { return (int)(draw() % (u64)n); }

static void say(const char *format, ...) {
    char line[256];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    if (length > (int)sizeof line - 1)
        length = sizeof line - 1;
    if (write(1, line, (size_t)length) < 0)
        _exit(3);
}

static void wrong(const char *what, u64 found, u64 expected) {
    say("WRONG %d %ld %s %s: %#llx, not %#llx\n", worker, epoch, task_name, what, (unsigned long long)found,
        (unsigned long long)expected);
    _exit(1);
}

static void check(const char *what, u64 found, u64 expected) {
    if (found != expected)
        wrong(what, found, expected);
}

static void need(int ok, const char *what) {
    if (!ok)
        wrong(what, (u64)errno, 0);
}

static u64 sum(const void *data, size_t length) {
    const unsigned char *at = data;
    u64 hash = 0xcbf29ce484222325u;
    while (length--)
        hash = (hash ^ *at++) * 0x100000001b3u;
    return hash;
}

static void fill(void *data, size_t length, u64 key) {
    u64 *at = data;
    for (size_t i = 0; i < length / 8; i++)
        at[i] = mix(key + i);
}

static void *pages(size_t count, int protection) {
    void *at = mmap(NULL, count * PAGE, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    need(at != MAP_FAILED, "mmap");
    return at;
}

static void join(pthread_t *threads, int count) {
    for (int i = 0; i < count; i++)
        need(!pthread_join(threads[i], NULL), "join");
}

static int status_of(pid_t child) {
    int status;
    while (waitpid(child, &status, 0) < 0)
        need(errno == EINTR, "waitpid");
    return WIFEXITED(status) ? WEXITSTATUS(status) : 256 + WTERMSIG(status);
}

/* -- processes ------------------------------------------------------------------------------------------------------ */

static u64 task_fork(void) {
    size_t length = (size_t)(1 + below(24)) * PAGE;
    unsigned char *data = pages(length / PAGE, PROT_READ | PROT_WRITE);
    u64 key = draw(), before;
    pid_t child[3];
    fill(data, length, key);
    before = sum(data, length);
    for (int i = 0; i < 3; i++) {
        child[i] = fork();
        need(child[i] >= 0, "fork");
        if (!child[i]) {
            for (size_t at = (size_t)i * 8; at < length; at += PAGE)
                data[at] ^= (unsigned char)(i + 1);
            _exit((int)(sum(data, length) & 0x7f));
        }
    }
    data[0] ^= 0x55;
    check("own page after fork", sum(data, length) == before, 0);
    data[0] ^= 0x55;
    check("memory after fork", sum(data, length), before);
    u64 result = before;
    for (int i = 0; i < 3; i++) {
        for (size_t at = (size_t)i * 8; at < length; at += PAGE)
            data[at] ^= (unsigned char)(i + 1);
        u64 expected = sum(data, length) & 0x7f;
        for (size_t at = (size_t)i * 8; at < length; at += PAGE)
            data[at] ^= (unsigned char)(i + 1);
        check("child's copy", (u64)status_of(child[i]), expected);
        result = mix(result + expected);
    }
    munmap(data, length);
    return result;
}

static u64 task_exec(void) {
    char number[24];
    int value = below(120);
    snprintf(number, sizeof number, "%d", value);
    pid_t child = fork();
    need(child >= 0, "fork");
    if (!child) {
        execl(self, "soak", "child", number, (char *)NULL);
        _exit(127);
    }
    check("status of a program", (u64)status_of(child), (u64)value);
    return (u64)value;
}

static u64 task_pipe(void) {
    int there[2], back[2];
    u64 key = draw(), value = key;
    int rounds = 50 + below(300);
    need(!pipe(there) && !pipe(back), "pipe");
    pid_t child = fork();
    need(child >= 0, "fork");
    if (!child) {
        for (int i = 0; i < rounds; i++) {
            u64 got;
            if (read(there[0], &got, 8) != 8)
                _exit(1);
            got = mix(got);
            if (write(back[1], &got, 8) != 8)
                _exit(1);
        }
        _exit(0);
    }
    for (int i = 0; i < rounds; i++) {
        u64 sent = value, got;
        need(write(there[1], &sent, 8) == 8 && read(back[0], &got, 8) == 8, "pipe I/O");
        value = mix(value);
        check("echo", got, value);
        value++;
    }
    check("status of the echo", (u64)status_of(child), 0);
    close(there[0]), close(there[1]), close(back[0]), close(back[1]);
    return value;
}

/* -- memory --------------------------------------------------------------------------------------------------------- */

static sigjmp_buf escape;
static volatile u64 fault_address;

static void on_fault(int number, siginfo_t *info, void *context) {
    (void)number, (void)context;
    fault_address = (u64)info->si_addr;
    siglongjmp(escape, 1);
}

static void expect_fault(volatile unsigned char *at, int write_it) {
    fault_address = 0;
    if (!sigsetjmp(escape, 1)) {
        if (write_it)
            *at = 1;
        else
            (void)*at;
        wrong("no fault at", (u64)at, 0);
    }
    check("address of a fault", fault_address, (u64)at);
}

static u64 task_mmap(void) {
    size_t count = (size_t)(8 + below(40)), length = count * PAGE;
    unsigned char *data = pages(count, PROT_READ | PROT_WRITE);
    u64 key = draw();
    fill(data, length, key);
    u64 before = sum(data, length);
    size_t hole = (size_t)below((int)count);
    need(!mprotect(data + hole * PAGE, PAGE, PROT_READ), "mprotect");
    expect_fault(data + hole * PAGE + below(PAGE), 1);
    need(!mprotect(data + hole * PAGE, PAGE, PROT_NONE), "mprotect");
    expect_fault(data + hole * PAGE + below(PAGE), 0);
    need(!mprotect(data + hole * PAGE, PAGE, PROT_READ | PROT_WRITE), "mprotect");
    check("memory after mprotect", sum(data, length), before);
    unsigned char *moved = mremap(data, length, length * 2, MREMAP_MAYMOVE);
    need(moved != MAP_FAILED, "mremap");
    check("memory after mremap", sum(moved, length), before);
    check("what mremap added", (u64)moved[length + (size_t)below((int)length)], 0);
    need(!munmap(moved + hole * PAGE, PAGE), "munmap");
    expect_fault(moved + hole * PAGE + below(PAGE), below(2));
    munmap(moved, length * 2);
    return before;
}

static u64 task_file(void) {
    char path[64];
    size_t count = (size_t)(4 + below(30)), length = count * PAGE;
    snprintf(path, sizeof path, "/tmp/soak-%d-%d", worker, (int)getpid());
    int file = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    need(file >= 0 && !ftruncate(file, (off_t)length), "file");
    unsigned char *shared = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    unsigned char *private = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
    unsigned char *copy = malloc(length);
    need(shared != MAP_FAILED && private != MAP_FAILED && copy, "mapping of a file");
    fill(shared, length, draw());
    u64 before = sum(shared, length);
    need(pread(file, copy, length, 0) == (ssize_t)length, "pread");
    check("what a shared mapping wrote", sum(copy, length), before);
    check("a private mapping", sum(private, length), before);
    for (size_t i = 0; i < count; i += 2)
        private[i * PAGE + 5] ^= 0xff;
    check("the file below a private mapping", sum(shared, length), before);
    munmap(shared, length), munmap(private, length), free(copy), close(file), unlink(path);
    return before;
}

/* A page that is mapped anew while others read it: once it is published, nobody may see what was there before. */
static struct {
    volatile u64 *page;
    volatile u64 published;
    volatile int stop;
} shoot;

static void *reader(void *unused) {
    while (!shoot.stop) {
        u64 at_least = __atomic_load_n(&shoot.published, __ATOMIC_ACQUIRE);
        u64 seen = __atomic_load_n(shoot.page, __ATOMIC_ACQUIRE);
        if (seen && seen < at_least)
            wrong("a page that was unmapped", seen, at_least);
    }
    return unused;
}

static u64 task_shootdown(void) {
    pthread_t threads[THREADS - 1];
    int rounds = 20 + below(200);
    shoot.page = pages(1, PROT_READ | PROT_WRITE);
    shoot.published = 0, shoot.stop = 0;
    for (int i = 0; i < THREADS - 1; i++)
        need(!pthread_create(&threads[i], NULL, reader, NULL), "thread");
    for (u64 i = 1; i <= (u64)rounds; i++) {
        if (i & 1) {
            void *at = mmap((void *)shoot.page, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
            need(at == (void *)shoot.page, "mmap over a page");
        } else {
            need(!madvise((void *)shoot.page, PAGE, MADV_DONTNEED), "madvise");
        }
        *shoot.page = i;
        __atomic_store_n(&shoot.published, i, __ATOMIC_RELEASE);
    }
    shoot.stop = 1;
    join(threads, THREADS - 1);
    munmap((void *)shoot.page, PAGE);
    return (u64)rounds;
}

/* -- threads -------------------------------------------------------------------------------------------------------- */

static struct {
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    u64 by_mutex, by_lock, by_spin, turn, last_time;
    volatile int spin;
    int rounds;
    unsigned __int128 wide __attribute__((aligned(16)));
} count;

static void *counter(void *argument) {
    u64 me = (u64)argument;
    for (int i = 0; i < count.rounds; i++) {
        pthread_mutex_lock(&count.mutex);
        count.by_mutex++;
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        u64 at = (u64)now.tv_sec * 1000000000u + (u64)now.tv_nsec;
        if (at < count.last_time)
            wrong("time went backwards", at, count.last_time);
        count.last_time = at;
        pthread_mutex_unlock(&count.mutex);
        __atomic_fetch_add(&count.by_lock, 3, __ATOMIC_RELAXED);
        while (__atomic_exchange_n(&count.spin, 1, __ATOMIC_ACQUIRE))
            for (int tries = 0; count.spin; tries++)
                if (tries < 100)
                    __builtin_ia32_pause();
                else
                    sched_yield();
        count.by_spin += me + 1;
        __atomic_store_n(&count.spin, 0, __ATOMIC_RELEASE);
        u64 low = (u64)count.wide, high = (u64)(count.wide >> 64);
        unsigned char done;
        do
            __asm__ volatile("lock cmpxchg16b %1; sete %0"
                             : "=q"(done), "+m"(count.wide), "+a"(low), "+d"(high)
                             : "b"(low + 1), "c"(high - 1)
                             : "memory");
        while (!done);
    }
    for (int i = 0; i < 20; i++) {
        pthread_mutex_lock(&count.mutex);
        while (count.turn % THREADS != me)
            pthread_cond_wait(&count.changed, &count.mutex);
        count.turn++;
        pthread_cond_broadcast(&count.changed);
        pthread_mutex_unlock(&count.mutex);
    }
    return NULL;
}

static u64 task_futex(void) {
    pthread_t threads[THREADS];
    pthread_mutex_init(&count.mutex, NULL);
    pthread_cond_init(&count.changed, NULL);
    count.by_mutex = count.by_lock = count.by_spin = count.turn = count.last_time = 0;
    count.wide = 0, count.spin = 0, count.rounds = 100 + below(2000);
    for (u64 i = 0; i < THREADS; i++)
        need(!pthread_create(&threads[i], NULL, counter, (void *)i), "thread");
    join(threads, THREADS);
    u64 n = (u64)count.rounds;
    check("count under a mutex", count.by_mutex, THREADS * n);
    check("count by locked additions", count.by_lock, 3 * THREADS * n);
    check("count under a spin lock", count.by_spin, n * (THREADS * (THREADS + 1) / 2));
    check("count by CMPXCHG16B", (u64)count.wide, THREADS * n);
    check("turns", count.turn, 20 * THREADS);
    return n;
}

/* The memory model: two threads that each write one word and read the other's (x86 lets both read the old one only
 * without a fence), and a message behind a flag. */
static struct {
    volatile u64 x __attribute__((aligned(64)));
    volatile u64 y __attribute__((aligned(64)));
    volatile u64 seen[2] __attribute__((aligned(64)));
    volatile u64 at[2] __attribute__((aligned(64)));
    u64 rounds;
} order;

static void *orderer(void *argument) {
    int me = argument != NULL;
    for (u64 i = 1; i <= order.rounds; i++) {
        __atomic_store_n(&order.at[me], 2 * i, __ATOMIC_SEQ_CST);
        for (int tries = 0; __atomic_load_n(&order.at[!me], __ATOMIC_SEQ_CST) < 2 * i; tries++)
            if (tries > 200)
                sched_yield();
        *(me ? &order.y : &order.x) = i;
        __asm__ volatile("mfence" : : : "memory");
        order.seen[me] = *(me ? &order.x : &order.y);
        __atomic_store_n(&order.at[me], 2 * i + 1, __ATOMIC_SEQ_CST);
        for (int tries = 0; __atomic_load_n(&order.at[!me], __ATOMIC_SEQ_CST) < 2 * i + 1; tries++)
            if (tries > 200)
                sched_yield();
        if (order.seen[0] < i && order.seen[1] < i)
            wrong("both stores behind both loads", order.seen[0], i);
    }
    return NULL;
}

static u64 task_order(void) {
    pthread_t other;
    order.x = order.y = order.at[0] = order.at[1] = 0;
    order.rounds = (u64)(50 + below(300));
    need(!pthread_create(&other, NULL, orderer, (void *)1), "thread");
    orderer(NULL);
    join(&other, 1);
    return order.rounds;
}

static u64 task_move(void) {
    cpu_set_t all, one;
    need(!sched_getaffinity(0, sizeof all, &all), "affinity");
    for (int i = 0; i < 200; i++) {
        int wanted = below(64);
        if (!CPU_ISSET(wanted, &all))
            continue;
        CPU_ZERO(&one);
        CPU_SET(wanted, &one);
        need(!sched_setaffinity(0, sizeof one, &one), "affinity");
        check("processor", (u64)sched_getcpu(), (u64)wanted);
        sched_yield();
    }
    need(!sched_setaffinity(0, sizeof all, &all), "affinity");
    return 0;
}

/* -- signals and floating point ------------------------------------------------------------------------------------- */

static volatile sig_atomic_t ticks;

static void on_tick(int number) {
    (void)number;
    /* spoil what the interrupted code has in its registers: the kernel has to give it back */
    volatile double x = 1.5;
    for (int i = 0; i < 20; i++)
        x = x * 1.0625 - (double)i;
    __asm__ volatile("fld1; fldpi; fmulp; fstp %%st(0); pxor %%xmm7, %%xmm7; pcmpeqd %%xmm15, %%xmm15"
                     : : : "xmm7", "xmm15", "st");
    ticks = ticks + 1;
}

static void control(int rounding) {
    unsigned mxcsr = 0x1f80 | (unsigned)rounding << 13;
    unsigned short word = (unsigned short)(0x37f | rounding << 10);
    __asm__ volatile("ldmxcsr %0; fldcw %1" : : "m"(mxcsr), "m"(word));
}

static u64 compute(u64 key, int rounds, int rounding) {
    double x = 1.0 + (double)(key & 0xffff) / 65536, y = 0.5, vector[8];
    long double wide = x;
    control(rounding);
    for (int i = 0; i < 8; i++)
        vector[i] = x * (i + 1);
    for (int i = 1; i <= rounds; i++) {
        y = y * 0.999 + x / i;
        wide = wide * 1.0000001L + (long double)y / (i + 1);
        __asm__ volatile("sqrtsd %1, %0" : "=x"(x) : "x"(x + y));
        for (int k = 0; k < 8; k++)
            vector[k] = vector[k] * 0.875 + x;
    }
    control(0);
    return mix(sum(&x, 8) + sum(&y, 8)) + sum(&wide, 10) + sum(vector, sizeof vector);
}

static u64 task_signals(void) {
    u64 key = draw();
    int rounds = 2000 + below(6000), rounding = below(4);
    u64 quiet = compute(key, rounds, rounding);
    struct itimerval often = {{0, 500 + below(2000)}, {0, 500}}, never = {{0, 0}, {0, 0}};
    ticks = 0;
    need(!setitimer(ITIMER_REAL, &often, NULL), "timer");
    for (int i = 0; i < 8; i++) {
        check("computing among signals", compute(key, rounds, rounding), quiet);
        kill(getpid(), SIGUSR1);
    }
    need(!setitimer(ITIMER_REAL, &never, NULL), "timer");
    check("signals", ticks >= 8, 1);
    return quiet;
}

struct job {
    u64 key, result;
    int rounding;
};

static void *computer(void *argument) {
    struct job *job = argument;
    u64 first = compute(job->key, 3000, job->rounding);
    for (int i = 0; i < 6; i++) {
        job->result = compute(job->key, 3000, job->rounding);
        if (job->result != first)
            wrong("computing among threads", job->result, first);
        sched_yield();
    }
    return NULL;
}

static u64 task_float(void) {
    pthread_t threads[THREADS];
    struct job jobs[THREADS];
    u64 result = 0;
    for (int i = 0; i < THREADS; i++) {
        jobs[i] = (struct job){draw(), 0, below(4)};
        need(!pthread_create(&threads[i], NULL, computer, &jobs[i]), "thread");
    }
    join(threads, THREADS);
    for (int i = 0; i < THREADS; i++)
        result = mix(result + jobs[i].result);
    return result;
}

/* Registers of vectors keep what they hold over system calls, faults and switches. */
static u64 task_registers(void) {
    u64 in[32], out[32];
    unsigned char *data = pages(16, PROT_READ | PROT_WRITE);
    for (int i = 0; i < 32; i++)
        in[i] = draw();
    for (int i = 0; i < 16; i++) {
        long call = 24;                          /* sched_yield */
        __asm__ volatile("movups (%1), %%xmm0; movups 16(%1), %%xmm3; movups 32(%1), %%xmm8; movups 48(%1), %%xmm15\n"
                         "fildll 64(%1); fildll 72(%1)\n"
                         "movb $1, (%3)\n"
                         "syscall\n"
                         "movups %%xmm0, (%2); movups %%xmm3, 16(%2); movups %%xmm8, 32(%2); movups %%xmm15, 48(%2)\n"
                         "fistpll 72(%2); fistpll 64(%2)\n"
                         : "+a"(call)
                         : "r"(in), "r"(out), "r"(data + i * PAGE)
                         : "rcx", "r11", "memory", "xmm0", "xmm3", "xmm8", "xmm15", "st", "st(1)");
        check("vector registers", sum(out, 64), sum(in, 64));
        check("x87 registers", sum(out + 8, 16), sum(in + 8, 16));
    }
    munmap(data, 16 * PAGE);
    return sum(in, sizeof in);
}

/* -- code that changes ---------------------------------------------------------------------------------------------- */

typedef u64 (*function)(void);

static void write_code(unsigned char *at, unsigned value) {
    at[0] = 0xb8;                                /* mov eax, value; ret */
    memcpy(at + 1, &value, 4);
    at[5] = 0xc3;
}

static u64 task_code(void) {
    unsigned char *code = pages(2, PROT_READ | PROT_WRITE | PROT_EXEC);
    u64 result = 0;
    for (int i = 0; i < 60; i++) {
        unsigned value = (unsigned)draw();
        unsigned char *at = code + below(PAGE + 64);
        write_code(at, value);
        check("code just written", ((function)(uintptr_t)at)(), value);
        at[1 + below(4)] ^= 0x41;
        memcpy(&value, at + 1, 4);
        check("code just changed", ((function)(uintptr_t)at)(), value);
        result = mix(result + value);
    }
    munmap(code, 2 * PAGE);
    /* The same address, other pages. */
    for (int i = 0; i < 6; i++) {
        unsigned value = (unsigned)draw();
        void *at = mmap(code, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        need(at == code, "mmap of code");
        write_code(code, value);
        need(!mprotect(code, PAGE, PROT_READ | PROT_EXEC), "mprotect");
        check("code on a new page", ((function)(uintptr_t)code)(), value);
        result = mix(result + value);
    }
    munmap(code, PAGE);
    return result;
}

/* One thread writes code, the others run it: announced, and behind a serializing instruction (Intel SDM vol 3,
 * "Handling Self- and Cross-Modifying Code"). */
static struct {
    unsigned char *run;
    volatile u64 ready, done[THREADS];
    volatile unsigned value;
    u64 rounds;
} cross;

static void *runner(void *argument) {
    u64 me = (u64)argument;
    for (u64 i = 1; i <= cross.rounds; i++) {
        for (int tries = 0; __atomic_load_n(&cross.ready, __ATOMIC_ACQUIRE) < i; tries++)
            if (tries > 100)
                sched_yield();
        unsigned a = 0, b, c, d;
        __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "=c"(c), "=d"(d) : : "memory");
        for (int again = 0; again < 3; again++) {
            u64 got = ((function)(uintptr_t)cross.run)();
            if (got != cross.value)
                wrong("code that another thread wrote", got, cross.value);
        }
        __atomic_store_n(&cross.done[me], i, __ATOMIC_RELEASE);
    }
    return NULL;
}

static u64 task_cross(void) {
    pthread_t threads[THREADS - 1];
    int file = memfd_create("soak", 0);
    need(file >= 0 && !ftruncate(file, PAGE), "memfd");
    unsigned char *alias = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    cross.run = mmap(NULL, PAGE, PROT_READ | PROT_EXEC, MAP_SHARED, file, 0);
    need(alias != MAP_FAILED && cross.run != MAP_FAILED, "mapping of code");
    cross.rounds = (u64)(5 + below(40)), cross.ready = 0;
    memset((void *)cross.done, 0, sizeof cross.done);
    for (u64 i = 0; i < THREADS - 1; i++)
        need(!pthread_create(&threads[i], NULL, runner, (void *)i), "thread");
    for (u64 i = 1; i <= cross.rounds; i++) {
        cross.value = (unsigned)draw();
        write_code(alias, cross.value);
        __atomic_store_n(&cross.ready, i, __ATOMIC_RELEASE);
        for (int k = 0; k < THREADS - 1; k++)
            for (int tries = 0; __atomic_load_n(&cross.done[k], __ATOMIC_ACQUIRE) < i; tries++)
                if (tries > 100)
                    sched_yield();
    }
    join(threads, THREADS - 1);
    munmap(alias, PAGE), munmap(cross.run, PAGE), close(file);
    return cross.value;
}

/* -- all of it ------------------------------------------------------------------------------------------------------ */

static const struct {
    const char *name;
    u64 (*run)(void);
} tasks[] = {
    {"fork", task_fork},           {"exec", task_exec},       {"pipe", task_pipe},
    {"mmap", task_mmap},           {"file", task_file},       {"shootdown", task_shootdown},
    {"futex", task_futex},         {"order", task_order},     {"move", task_move},
    {"signals", task_signals},     {"float", task_float},     {"registers", task_registers},
    {"code", task_code},           {"cross", task_cross},
};

static u64 run_epoch(u64 seed, int who, long number) {
    u64 digest = 0;
    worker = who, epoch = number;
    generator = mix(mix(seed + (u64)who * 0x10001) + (u64)number);
    for (int i = 0; i < TASKS_PER_EPOCH; i++) {
        int which = below((int)(sizeof tasks / sizeof *tasks));
        task_name = tasks[which].name;
        /* what a task draws may depend on the machine; what comes behind it must not */
        u64 saved = draw();
        digest = mix(digest + tasks[which].run());
        generator = saved;
    }
    return digest;
}

static void handle(int number, void (*handler)(int), void (*with_info)(int, siginfo_t *, void *)) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    if (with_info) {
        action.sa_sigaction = with_info;
        action.sa_flags = SA_SIGINFO;
    } else {
        action.sa_handler = handler;
        action.sa_flags = SA_RESTART;
    }
    sigaction(number, &action, NULL);
}

int main(int argc, char **argv) {
    if (argc == 3 && !strcmp(argv[1], "child"))
        return atoi(argv[2]);
    if (argc < 4) {
        fprintf(stderr, "soak SEED WORKERS SECONDS, or soak SEED WORKER NUMBER replay\n");
        return 2;
    }
    self = argc > 4 ? "/proc/self/exe" : argv[0];
    u64 seed = strtoull(argv[1], NULL, 0);
    handle(SIGSEGV, NULL, on_fault);
    handle(SIGALRM, on_tick, NULL);
    handle(SIGUSR1, on_tick, NULL);
    if (argc > 4) {
        say("DIGEST %016llx\n", (unsigned long long)run_epoch(seed, atoi(argv[2]), atol(argv[3])));
        return 0;
    }
    int workers = atoi(argv[2]), failed = 0;
    time_t end = time(NULL) + atol(argv[3]);
    for (int who = 0; who < workers; who++) {
        if (fork())
            continue;
        for (long number = 0; time(NULL) < end; number++) {
            u64 digest = run_epoch(seed, who, number);
            say("EPOCH %d %ld %016llx\n", who, number, (unsigned long long)digest);
        }
        return 0;
    }
    for (int who = 0; who < workers; who++) {
        int status;
        wait(&status);
        if (status) {
            say("FAILED a worker ended with status %#x\n", status);
            failed = 1;
        }
    }
    return failed;
}
