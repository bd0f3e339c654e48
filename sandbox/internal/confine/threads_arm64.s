#include "textflag.h"

// onSignal is the signal handler of threads.go. The kernel calls it, and restores every
// register when it has returned to the kernel's own trampoline.
TEXT ·onSignal(SB), NOSPLIT|NOFRAME, $0
	MOVD ·order+0(SB), R9 // calls
	MOVD ·order+8(SB), R10 // n
next:
	MOVD 0(R9), R8
	MOVD 8(R9), R0
	MOVD 16(R9), R1
	MOVD 24(R9), R2
	MOVD $0, R3
	MOVD $0, R4
	MOVD $0, R5
	SVC
	CBNZ R0, told
	ADD $32, R9
	SUB $1, R10
	CBNZ R10, next
told:
	SUB $16, RSP
	MOVD R0, (RSP)
	MOVD $64, R8 // write
	MOVD ·order+16(SB), R0 // result
	MOVD RSP, R1
	MOVD $8, R2
	SVC
	ADD $16, RSP
	RET

TEXT ·onSignalPC(SB), NOSPLIT, $0-8
	MOVD $·onSignal(SB), R0
	MOVD R0, ret+0(FP)
	RET

TEXT ·restorerPC(SB), NOSPLIT, $0-8
	MOVD $0, R0
	MOVD R0, ret+0(FP)
	RET
