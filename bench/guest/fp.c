/* The floating-point workload of the benchmark: double precision by SSE2, no mathematics library but square roots.
 *
 * gcc -O2 -static -march=x86-64 -ffp-contract=off: the same file runs in every guest and on the host. It prints the bits
 * of what it computed, so that one wrong rounding is another output. */

#include <stdint.h>
#include <stdio.h>
#include <string.h>

static double root(double x) {
    __asm__("sqrtsd %0, %0" : "+x"(x));
    return x;
}

static void show(const char *name, double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    printf("%s %016llx\n", name, (unsigned long long)bits);
}

/* How many steps the points of a grid take to leave the circle of radius 2. */
static double mandelbrot(int size, int limit) {
    double total = 0;
    for (int row = 0; row < size; row++) {
        for (int column = 0; column < size; column++) {
            double cr = 3.0 * column / size - 2.25, ci = 2.5 * row / size - 1.25, r = 0, i = 0;
            int step = 0;
            while (step < limit && r * r + i * i <= 4.0) {
                double next = r * r - i * i + cr;
                i = 2.0 * r * i + ci;
                r = next;
                step++;
            }
            total += step + r;
        }
    }
    return total;
}

#define BODIES 5

/* Bodies that attract each other, by equal steps of time; returns the energy at the end. */
static double nbody(int steps) {
    double x[BODIES][3], v[BODIES][3], mass[BODIES], energy = 0;
    for (int i = 0; i < BODIES; i++) {
        mass[i] = i ? 0.04 / i : 39.5;
        for (int k = 0; k < 3; k++) {
            x[i][k] = i * (1.5 + 0.3 * k) * ((i + k) & 1 ? 1 : -1);
            v[i][k] = i * (0.7 - 0.2 * k) * ((i ^ k) & 1 ? 1 : -1) / (1 + i);
        }
    }
    for (int step = 0; step < steps; step++) {
        for (int i = 0; i < BODIES; i++) {
            for (int j = i + 1; j < BODIES; j++) {
                double d[3], square = 0, pull;
                for (int k = 0; k < 3; k++) {
                    d[k] = x[i][k] - x[j][k];
                    square += d[k] * d[k];
                }
                pull = 0.001 / (square * root(square));
                for (int k = 0; k < 3; k++) {
                    v[i][k] -= d[k] * mass[j] * pull;
                    v[j][k] += d[k] * mass[i] * pull;
                }
            }
        }
        for (int i = 0; i < BODIES; i++)
            for (int k = 0; k < 3; k++)
                x[i][k] += 0.001 * v[i][k];
    }
    for (int i = 0; i < BODIES; i++)
        for (int k = 0; k < 3; k++)
            energy += 0.5 * mass[i] * v[i][k] * v[i][k];
    return energy;
}

#define SIZE 160

static double a[SIZE][SIZE], b[SIZE][SIZE], c[SIZE][SIZE];

/* Products of two dense matrices; returns the trace. */
static double matrix(int times) {
    double trace = 0;
    for (int i = 0; i < SIZE; i++) {
        for (int j = 0; j < SIZE; j++) {
            a[i][j] = (i * 7 + j * 3) % 11 / 11.0;
            b[i][j] = (i * 5 + j * 13) % 17 / 17.0;
        }
    }
    while (times--) {
        for (int i = 0; i < SIZE; i++) {
            for (int j = 0; j < SIZE; j++)
                c[i][j] = 0;
            for (int k = 0; k < SIZE; k++)
                for (int j = 0; j < SIZE; j++)
                    c[i][j] += a[i][k] * b[k][j];
        }
        for (int i = 0; i < SIZE; i++) {
            trace += c[i][i];
            a[i][times % SIZE] = c[i][i] / 64.0;
        }
    }
    return trace;
}

/* Polynomials of degree 12 by Horner's rule, and a division each. */
static double polynomial(int count) {
    double total = 0;
    for (int n = 0; n < count; n++) {
        double x = n / (double)count - 0.5, y = 1.0 / 479001600, divisor = 479001600;
        for (int k = 12; k > 0; k--) {
            divisor /= k;
            y = y * x + 1.0 / divisor;
        }
        total += y / (1.0 + x * x);
    }
    return total;
}

int main(void) {
    show("mandelbrot", mandelbrot(500, 400));
    show("nbody", nbody(600000));
    show("matrix", matrix(100));
    show("polynomial", polynomial(1500000));
    return 0;
}
