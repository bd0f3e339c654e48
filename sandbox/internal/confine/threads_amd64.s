#include "textflag.h"

// onSignal is the signal handler of threads.go. The kernel calls it, and restores every
// register when it has returned to restorer.
TEXT ·onSignal(SB), NOSPLIT|NOFRAME, $0
	MOVQ ·order+0(SB), BX // calls
	MOVQ ·order+8(SB), R12 // n
next:
	MOVQ 0(BX), AX
	MOVQ 8(BX), DI
	MOVQ 16(BX), SI
	MOVQ 24(BX), DX
	XORL R10, R10
	XORL R8, R8
	XORL R9, R9
	SYSCALL
	TESTQ AX, AX
	JNE told
	ADDQ $32, BX
	DECQ R12
	JNE next
told:
	PUSHQ AX
	MOVQ $1, AX // write
	MOVQ ·order+16(SB), DI // result
	MOVQ SP, SI
	MOVQ $8, DX
	SYSCALL
	POPQ AX
	RET

TEXT ·restorer(SB), NOSPLIT|NOFRAME, $0
	MOVQ $15, AX // rt_sigreturn
	SYSCALL
	INT $3

TEXT ·onSignalPC(SB), NOSPLIT, $0-8
	MOVQ $·onSignal(SB), AX
	MOVQ AX, ret+0(FP)
	RET

TEXT ·restorerPC(SB), NOSPLIT, $0-8
	MOVQ $·restorer(SB), AX
	MOVQ AX, ret+0(FP)
	RET
