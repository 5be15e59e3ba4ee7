/* The guest's part of bench/drift.py: tells its clocks at a port, under load.
 *
 *   drift PORT WORKERS
 *
 * Every half second a burst: the clocks are read, then PORT is written, which is when the host reads its own, then what
 * was read goes to PORT + 4, 32 bits at a time. 1 at PORT ends the burst; PORT reads as 0 when it is enough. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/io.h>
#include <time.h>
#include <unistd.h>

#define TRIES 300
#define APART 30000 /* some 30 microseconds: a burst sees several ticks of a clock that only moves with them */

static uint64_t now(clockid_t clock) {
    struct timespec time;
    clock_gettime(clock, &time);
    return time.tv_sec * 1000000000ull + time.tv_nsec;
}

static void send(int port, uint64_t value) {
    outl((uint32_t)value, port + 4);
    outl((uint32_t)(value >> 32), port + 4);
}

static void spin(long times) {
    for (volatile long i = 0; i < times; i++)
        ;
}

/* Computes, calls the kernel, writes memory: until it is killed. */
static void burn(void) {
    static char memory[1 << 20];
    for (unsigned n = 0;; n++) {
        spin(20000);
        memory[n * 4099 % sizeof memory]++;
        getppid();
        if (n % 64 == 0)
            usleep(100);
    }
}

int main(int argc, char **argv) {
    int port = argc > 2 ? atoi(argv[1]) : 0, workers = argc > 2 ? atoi(argv[2]) : 0;
    if (!port || iopl(3)) {
        fprintf(stderr, "drift: PORT WORKERS, as root\n");
        return 2;
    }
    for (int i = 0; i < workers; i++)
        if (fork() == 0)
            burn();
    while (inl(port)) {
        for (int try = 0; try < TRIES; try++) {
            uint64_t raw = now(CLOCK_MONOTONIC_RAW), real = now(CLOCK_REALTIME);
            outl(0, port);
            send(port, raw);
            send(port, real);
            spin(APART);
        }
        outl(1, port);
        usleep(500000);
    }
    return 0;
}
