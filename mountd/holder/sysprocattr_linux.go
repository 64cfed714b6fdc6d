package holder

import "syscall"

// sysProcAttr puts a started process into a session of its own: no terminal,
// no signals meant for the starter's group.
var sysProcAttr = &syscall.SysProcAttr{Setsid: true}
