#!/bin/busybox sh
# The first process of pyhyve's own guest. What it does is asked for on the kernel's command line:
#   pyhyve.tour          show the machine, then power off
#   pyhyve.run=PATH      run the shell script PATH, then power off
#   pyhyve.bench=NAMES   run /etc/pyhyve/bench.sh NAMES (comma-separated, or all), then power off
#   (nothing)            a shell on the console; power off when it ends

/bin/busybox --install -s /bin
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root
[ "$TERM" = linux ] && export TERM=vt102 # the kernel's guess is for a screen; this console is a serial line

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev 2>/dev/null
mkdir -p /dev/pts && mount -t devpts devpts /dev/pts 2>/dev/null
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
hostname pyhyve
exec </dev/console >/dev/console 2>&1
cd "$HOME"

tour() {
	echo
	echo "--- pyhyve: a tour of the guest"
	echo "kernel:    $(uname -a)"
	echo "processor: $(sed -n 's/^model name[[:space:]]*: //p' /proc/cpuinfo | head -n 1) ($(grep -c ^processor /proc/cpuinfo) online)"
	echo "memory:    $(awk '/^MemTotal/ { t = $2 } /^MemAvailable/ { a = $2 } END { printf "%d MiB, %d MiB available", t / 1024, a / 1024 }' /proc/meminfo)"
	echo "uptime:    $(cut -d ' ' -f 1 /proc/uptime) s"
	echo "computing: the 1000th prime is $(awk 'BEGIN {
		for (n = 2; found < 1000; n++) {
			prime = 1
			for (i = 1; i <= found && p[i] * p[i] <= n; i++)
				if (n % p[i] == 0) { prime = 0; break }
			if (prime) p[++found] = n
		}
		print p[1000]
	}')"
	echo "computing: sha256 of the numbers to 10000 is $(seq 1 10000 | sha256sum | cut -c 1-16)..."
	echo "--- the tour is over"
}

mode=shell
argument=
set -f # words of the command line are not patterns
for word in $(cat /proc/cmdline); do
	case $word in
	pyhyve.tour) mode=tour ;;
	pyhyve.run=*) mode=run argument=${word#*=} ;;
	pyhyve.bench=*) mode=bench argument=${word#*=} ;;
	esac
done
set +f

case $mode in
tour) tour ;;
run)
	sh "$argument"
	echo "pyhyve.run: $argument ended with status $?"
	;;
bench) sh /etc/pyhyve/bench.sh "$(echo "$argument" | tr , ' ')" ;;
shell)
	echo
	echo "This is $(uname -sr) under pyhyve. 'busybox' lists the commands; 'exit' powers off."
	echo
	export PS1='\u@\h:\w\$ ' USER=root
	setsid cttyhack sh
	;;
esac
poweroff -f
