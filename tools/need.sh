#!/bin/bash
# need.sh THING PACKAGE: succeeds where THING (a command, or a file by its full path) is there, else says what to install.
thing=$1
package=$2
command -v "$thing" >/dev/null 2>&1 || [ -e "$thing" ] || {
  echo "make: $thing: not found; on Debian and Ubuntu: apt-get install $package" >&2
  exit 1
}
