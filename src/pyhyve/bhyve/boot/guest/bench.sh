#!/bin/busybox sh
# The workloads of pyhyve's benchmark, each timed where it runs. The same file runs in the guest and on the host:
#   busybox sh bench.sh [all | NAME...]
# "all" is the eight. "fp" runs the program fp beside this file; "serial" and "parallel" do the same two jobs, one after
# the other and at the same time.
# For each workload it prints "RUN name" as the clock starts, "BENCH name seconds" when it has stopped, and "CHECK name
# digest" of the output, which is the same wherever the same busybox runs rightly. Everything is done by this shell's
# own busybox.

busybox=$(readlink /proc/$$/exe)
here=${0%/*}
dir=$(mktemp -d "${TMPDIR:-/tmp}/bench.XXXXXX") || exit 1
trap 'rm -rf "$dir"' EXIT

# Sets `clock` to the seconds since some fixed time. The shell's own variable has microseconds and needs no process that
# would be timed along; without it there is `ts`, and without that the uptime's hundredths.
if [ -n "$EPOCHREALTIME" ]; then
	read_clock() { clock=$EPOCHREALTIME; }
elif [ -n "$(echo | "$busybox" ts %.s 2>/dev/null)" ]; then
	read_clock() { clock=$(echo | "$busybox" ts %.s); }
else
	read_clock() { read -r clock _ </proc/uptime; }
fi

# Each workload has a preparation, which is not timed, and a body, whose output is kept.
prepare_sha256sum() { "$busybox" head -c 33554432 /dev/zero >"$dir/in"; }
bench_sha256sum() { "$busybox" sha256sum <"$dir/in"; }

# busybox itself, over and over: a program is neither trivial nor impossible to compress.
prepare_gzip() {
	for _ in 1 2 3 4 5 6 7 8; do "$busybox" cat "$busybox"; done 2>/dev/null | "$busybox" head -c 8388608 >"$dir/in"
}
bench_gzip() { "$busybox" gzip -c <"$dir/in"; }

bench_awk() {
	"$busybox" awk 'BEGIN { x = 0.5; for (i = 0; i < 1000000; i++) x = x * 1.0000001 + 0.5 / (i + 1); printf "%.12g\n", x }'
}

bench_forkexec() {
	i=0
	while [ $i -lt 500 ]; do
		"$busybox" true
		i=$((i + 1))
	done
	echo $i
}

bench_dd() {
	"$busybox" dd if=/dev/zero of=/dev/null bs=1 count=200000 2>"$dir/log"
	"$busybox" grep out "$dir/log"
}

bench_shell() {
	i=0 sum=0
	while [ $i -lt 200000 ]; do
		i=$((i + 1))
		sum=$(((sum * 31 + i) & 0xffffff))
	done
	echo $sum
}

bench_md5sum() { "$busybox" seq 1 1000000 | "$busybox" md5sum; }

bench_sort() { "$busybox" seq 1 300000 | "$busybox" sort -n; }

bench_fp() { "$here/fp"; }

# About as much awk as shell, so that two of it are two processes that compute and start others.
job() {
	"$busybox" awk 'BEGIN { x = 0.5; for (i = 0; i < 250000; i++) x = x * 1.0000001 + 0.5 / (i + 1); printf "%.12g\n", x }'
	i=0 sum=0
	while [ $i -lt 60000 ]; do
		i=$((i + 1))
		sum=$(((sum * 31 + i) & 0xffffff))
	done
	echo $sum
}

bench_serial() {
	(job)
	(job)
}

bench_parallel() {
	job >"$dir/first" &
	job >"$dir/second" &
	wait
	"$busybox" cat "$dir/first" "$dir/second"
}

names="sha256sum gzip awk forkexec dd shell md5sum sort"
more="fp serial parallel"

[ $# -gt 0 ] || set -- all
for name in $*; do
	[ "$name" = all ] && set -- $names
done

status=0
for name in $*; do
	case " $names $more " in
	*" $name "*) ;;
	*)
		echo "bench.sh: unknown workload '$name'; there are: $names $more" >&2
		status=2
		continue
		;;
	esac
	: >"$dir/in"
	case $name in sha256sum | gzip) "prepare_$name" ;; esac
	echo "RUN $name"
	read_clock
	start=$clock
	"bench_$name" >"$dir/out"
	read_clock
	"$busybox" awk "BEGIN { printf \"BENCH $name %.6f\\n\", $clock - $start }"
	echo "CHECK $name $("$busybox" md5sum <"$dir/out" | "$busybox" cut -c 1-32)"
done
exit $status
