# Shared by the demo scripts; sourced, not run.

demo_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$demo_dir/../.." && pwd)
cache=$repo/.cache/demo
export LC_ALL=C.UTF-8
# One date for everything that is made here, so that two runs give the same image.
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-1700000000}
export PATH=$PATH:/usr/sbin:/sbin:/usr/local/go/bin

if [ -t 1 ]; then bold=$'\e[1m' dim=$'\e[2m' plain=$'\e[0m'; else bold='' dim='' plain=''; fi

say() { printf '\n%s== %s%s\n' "$bold" "$*" "$plain"; }
note() { printf '%s   %s%s\n' "$dim" "$*" "$plain"; }
die() {
	printf 'demo: %s\n' "$*" >&2
	exit 1
}

# install_missing COMMAND=PACKAGE...: installs the packages whose command is not there.
install_missing() {
	local missing=() pair
	for pair in "$@"; do
		command -v "${pair%%=*}" >/dev/null || missing+=("${pair#*=}")
	done
	[ ${#missing[@]} -gt 0 ] || return 0
	command -v apt-get >/dev/null || die "please install: ${missing[*]} (this is no Debian: there is no apt-get)"
	note "installing ${missing[*]}"
	apt_update
	DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 install -y --no-install-recommends \
		"${missing[@]}" >/dev/null || die "apt-get could not install ${missing[*]}"
}

# apt_update reads the package lists once per run.
apt_update() {
	[ -z "${apt_updated:-}" ] || return 0
	apt-get -qq -o Acquire::Retries=3 update || note "apt-get update reported errors; going on with the lists that are there"
	apt_updated=yes
}
